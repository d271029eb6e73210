// Loops for what costs Python a call for each: calls of one compiled function for many leaves, and words of randomness.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "chainrule/parallel.hpp"
#include "chainrule/threefry.hpp"
#include "checks.hpp"
#include "doors.hpp"
#include "invoke.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

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

  void run(std::vector<Word> words, int threads) const {
    in_range("threads", threads, 1, 1024);
    if (words.size() != tensors_) {
      refuse("pointers", std::to_string(tensors_) + ", one for each tensor", std::to_string(words.size()));
    }
    words.insert(words.end(), numbers_.begin(), numbers_.end());
    const py::gil_scoped_release release;
    const auto call = [&](std::int64_t i) { invoke_row(rows_[i], words); };
    const auto calls = static_cast<std::int64_t>(rows_.size());
    if (threads > 1) {
      Pool::instance().run(calls, threads, call);
    } else {
      for (std::int64_t i = 0; i < calls; ++i) call(i);
    }
  }

 private:
  void invoke_row(const std::vector<std::size_t>& row, const std::vector<Word>& words) const {
    std::array<Word, kArguments> arguments;
    for (std::size_t i = 0; i < row.size(); ++i) arguments[i] = words[row[i]];
    invoke(function_, arguments.data(), row.size());
  }

  Word function_;
  std::vector<std::vector<std::size_t>> rows_;
  std::vector<Word> numbers_;
  std::size_t tensors_;
};

// Words of 64 bits of which 32 are used; `steps` are 0 where one word is for all.
void threefry(const std::array<Word, 4>& given, const std::array<std::size_t, 4>& steps, Word first, Word second,
              std::size_t count) {
  const auto word = [&](int i, std::size_t at) {
    return static_cast<std::uint32_t>(reinterpret_cast<const std::int64_t*>(given[i])[at * steps[i]]);
  };
  for (std::size_t at = 0; at < count; ++at) {
    const Words made = threefry2x32({word(0, at), word(1, at)}, {word(2, at), word(3, at)});
    reinterpret_cast<std::int64_t*>(first)[at] = made.first;
    reinterpret_cast<std::int64_t*>(second)[at] = made.second;
  }
}

}  // namespace

void add_launch_door(py::module_& m) {
  using py::arg;
  py::class_<Launches>(m, "Launches")
      .def(py::init<Word, std::vector<std::vector<std::size_t>>, std::vector<Word>, std::size_t>(), arg("function"),
           arg("rows"), arg("numbers"), arg("tensors"))
      .def("run", &Launches::run, arg("pointers"), arg("threads") = 1);
  m.def("threefry2x32", &threefry, arg("words"), arg("steps"), arg("first"), arg("second"), arg("count"));
}

}  // namespace chainrule
