// The Python module chainrule.native._kernel.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_kernel, m) {
  m.doc() = "Kernel of chainrule's tier update and quantised state.";
  m.def("info", [] {
    py::dict facts;
    facts["compiler"] = __VERSION__;
    facts["standard"] = static_cast<long>(__cplusplus);
    return facts;
  });
}
