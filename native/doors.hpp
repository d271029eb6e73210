// What the two doors give the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string_view>

namespace chainrule {

// The position of a name in a table of names, -1 if it is not there.
template <std::size_t kCount>
int index_of(const char* const (&names)[kCount], std::string_view name) {
  for (std::size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
  }
  return -1;
}

// tier2, tier1, tier0, statistics, quantize, ... over NumPy arrays and raw memory.
void add_numpy_door(pybind11::module_& module);

// Programs of scalars.
void add_scalar_door(pybind11::module_& module);

// {name: capsule} of the XLA FFI handlers.
pybind11::dict xla_targets();

// The names and orders that C++ and Python share: the columns of tables, denominators, kinds of sums.
pybind11::dict layout();

}  // namespace chainrule
