// What the doors give the module.
#pragma once

#include <pybind11/pybind11.h>

#include "xla/ffi/api/c_api.h"

namespace chainrule {

// tier2, tier1, tier0, statistics, quantize, ... over NumPy arrays and raw memory.
void add_numpy_door(pybind11::module_& module);

// Programs of scalars.
void add_scalar_door(pybind11::module_& module);

// Programs of elements.
void add_element_door(pybind11::module_& module);

// Calls of one compiled function for many leaves.
void add_launch_door(pybind11::module_& module);

// Loops that were compiled for a chain.
void add_loop_door(pybind11::module_& module);
XLA_FFI_Handler* loops_handler();
// Tensors in codes: decoded, encoded, and calls of a compiled function tile by tile in between.
void add_code_door(pybind11::module_& module);

// {name: capsule} of the XLA FFI handlers.
pybind11::dict xla_targets();

// The names and orders that C++ and Python share: the columns of tables, denominators, kinds of sums.
pybind11::dict layout();

}  // namespace chainrule
