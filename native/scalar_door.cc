// Programs of scalars (chainrule/scalars.hpp) over raw memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chainrule/scalars.hpp"
#include "checks.hpp"
#include "doors.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

using Instruction = std::tuple<std::string, int, int, int, int>;
using Place = std::tuple<int, int, int, int>;
using Words = py::array_t<Word, py::array::c_style>;

auto op_of(const std::string& name) {
  for (const ScalarOp& op : scalar_ops()) {
    if (name == op.name) return op.apply;
  }
  refuse("instructions", "of `scalar_ops`", "'" + name + "'");
}

class ScalarProgram {
 public:
  ScalarProgram(const std::vector<Instruction>& instructions, const std::vector<Place>& loads,
                const std::vector<Place>& stores, Words words, int tensors)
      : words_(std::move(words)), tensors_(tensors) {
    if (words_.ndim() != 1 || !words_.writeable()) {
      refuse("words", "a uint32 vector that may be written", std::to_string(words_.ndim()) + " axes");
    }
    for (const auto& [name, result, a, b, c] : instructions) {
      for (const int index : {result, a, b, c}) require_index("instructions: a word", index, words_.size());
      code_.push_back({op_of(name), result, a, b, c});
    }
    loads_ = places(loads, "loads");
    stores_ = places(stores, "stores");
  }

  void run(const std::vector<std::uintptr_t>& pointers) {
    if (pointers.size() != static_cast<std::size_t>(tensors_)) {
      refuse("pointers", std::to_string(tensors_) + ", one for each tensor", std::to_string(pointers.size()));
    }
    for (std::size_t i = 0; i < pointers.size(); ++i) {
      if (pointers[i] == 0) refuse(at("pointers", i), "the address of a tensor", "null");
    }
    run_scalars(code_, loads_, stores_, words_.mutable_data(), pointers);
  }

 private:
  static void require_index(const std::string& what, int index, py::ssize_t size) {
    in_range<std::int64_t>(what, index, 0, size - 1);
  }

  std::vector<ScalarPlace> places(const std::vector<Place>& given, const std::string& name) const {
    std::vector<ScalarPlace> places;
    for (const auto& [word, tensor, offset, bytes] : given) {
      require_index(name + ": a word", word, words_.size());
      require_index(name + ": a tensor", tensor, tensors_);
      if (offset < 0 || (bytes != 1 && bytes != 4)) {
        refuse(name, "at an offset of at least 0 and of 1 or 4 bytes",
               std::to_string(offset) + " and " + std::to_string(bytes));
      }
      places.push_back({word, tensor, offset, bytes});
    }
    return places;
  }

  Words words_;
  int tensors_;
  std::vector<ScalarInstruction> code_;
  std::vector<ScalarPlace> loads_, stores_;
};

}  // namespace

void add_scalar_door(py::module_& m) {
  using py::arg;
  py::class_<ScalarProgram>(m, "ScalarProgram")
      .def(py::init<const std::vector<Instruction>&, const std::vector<Place>&, const std::vector<Place>&, Words,
                    int>(),
           arg("instructions"), arg("loads"), arg("stores"), arg("words").noconvert(), arg("tensors"))
      .def("run", &ScalarProgram::run, arg("pointers"));
  m.def("scalar_ops", [] {
    std::vector<std::string> names;
    for (const ScalarOp& op : scalar_ops()) names.emplace_back(op.name);
    return names;
  });
}

}  // namespace chainrule
