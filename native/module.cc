// The Python module chainrule.native._kernel: its doors and what was built.
#include <pybind11/pybind11.h>

#include "chainrule/kernels.hpp"
#include "chainrule/parallel.hpp"
#include "checks.hpp"
#include "doors.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_kernel, m) {
  m.doc() = "Kernel of chainrule's tier update, block-quantised state, sums over tensors and scalars.";
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      std::rethrow_exception(raised);
    } catch (const chainrule::WrongType& error) {  // what is only a std::invalid_argument becomes a ValueError
      py::set_error(PyExc_TypeError, error.what());
    }
  });
  chainrule::add_numpy_door(m);
  chainrule::add_scalar_door(m);
  chainrule::add_element_door(m);
  chainrule::add_launch_door(m);
  chainrule::add_loop_door(m);
  chainrule::add_code_door(m);
  m.def("xla_targets", &chainrule::xla_targets);
  m.def("layout", &chainrule::layout);
  m.def("info", [] {
    const chainrule::KernelChoices& choices = chainrule::kernel_choices();
    py::list instruction_sets;
    for (int i = 0; i < choices.count; ++i) instruction_sets.append(choices.kernels[i]->instruction_set);
    py::dict facts;
    facts["compiler"] = CHAINRULE_COMPILER;
    facts["instruction_sets"] = instruction_sets;
    facts["instruction_set"] = chainrule::kernels().instruction_set;
    facts["threads"] = chainrule::default_threads();
    return facts;
  });
}
