// Programs of elements: their constructor and what they know, in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "doors.hpp"
#include "element_program.hpp"

namespace py = pybind11;

namespace chainrule {

void add_element_door(py::module_& m) {
  using py::arg;
  py::class_<ElementProgram, std::shared_ptr<ElementProgram>>(m, "ElementProgram")
      .def(py::init<const std::vector<ElementProgram::Step>&, const std::vector<ElementProgram::Row>&,
                    ElementProgram::Words, std::size_t, ElementProgram::Results>(),
           arg("steps"), arg("rows"), arg("words").noconvert(), arg("tensors"),
           arg("sums").noconvert() = ElementProgram::Results(0))
      .def("run", &ElementProgram::run, arg("pointers"), arg("threads") = 1);
  m.def("element_ops", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kElementOps; ++i) names.emplace_back(kernels().element_ops[i].name);
    return names;
  });
  m.attr("ELEMENT_PLACES") = py::make_tuple(kElementTensors, kElementRooms, kElementNumbers, kElementSums);
}

}  // namespace chainrule
