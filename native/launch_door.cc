// Calls of one compiled function for many leaves: what costs a Python call for each is a loop here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "doors.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

using Word = std::uintptr_t;
using Invoke = void (*)(Word, const Word*);

constexpr std::size_t kArguments = 64;

// A pointer and an int64_t are passed alike on every 64-bit platform that the kernel is built for.
template <std::size_t... kIndex>
void invoke(Word function, const Word* words) {
  reinterpret_cast<void (*)(decltype(Word{kIndex})...)>(function)(words[kIndex]...);
}

template <std::size_t... kIndex>
constexpr Invoke invoke_of(std::index_sequence<kIndex...>) {
  return &invoke<kIndex...>;
}

template <std::size_t... kCount>
constexpr std::array<Invoke, sizeof...(kCount)> invokes(std::index_sequence<kCount...>) {
  return {invoke_of(std::make_index_sequence<kCount>())...};
}

constexpr auto kInvokes = invokes(std::make_index_sequence<kArguments + 1>());

class Launches {
 public:
  Launches(Word function, std::vector<std::vector<std::size_t>> rows, std::vector<Word> numbers, std::size_t tensors)
      : function_(function), rows_(std::move(rows)), numbers_(std::move(numbers)), tensors_(tensors) {
    if (function_ == 0) refuse("function", "the address of one", "null");
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      in_range<std::size_t>(at("rows", i) + ": its length", rows_[i].size(), 0, kArguments);
      for (const std::size_t source : rows_[i]) {
        in_range<std::size_t>(at("rows", i), source, 0, tensors_ + numbers_.size() - 1);
      }
    }
  }

  void run(std::vector<Word> words) const {
    if (words.size() != tensors_) {
      refuse("pointers", std::to_string(tensors_) + ", one for each tensor", std::to_string(words.size()));
    }
    words.insert(words.end(), numbers_.begin(), numbers_.end());
    const py::gil_scoped_release release;
    std::array<Word, kArguments> arguments;
    for (const auto& row : rows_) {
      for (std::size_t i = 0; i < row.size(); ++i) arguments[i] = words[row[i]];
      kInvokes[row.size()](function_, arguments.data());
    }
  }

 private:
  Word function_;
  std::vector<std::vector<std::size_t>> rows_;
  std::vector<Word> numbers_;
  std::size_t tensors_;
};

}  // namespace

void add_launch_door(py::module_& m) {
  using py::arg;
  py::class_<Launches>(m, "Launches")
      .def(py::init<Word, std::vector<std::vector<std::size_t>>, std::vector<Word>, std::size_t>(), arg("function"),
           arg("rows"), arg("numbers"), arg("tensors"))
      .def("run", &Launches::run, arg("pointers"));
}

}  // namespace chainrule
