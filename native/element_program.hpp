// Programs of chainrule/elements.hpp over raw memory: one for alike pieces of many leaves, in one parallel loop.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "checks.hpp"

namespace py = pybind11;

namespace chainrule {

// Four tensors and as many rooms are half of a first-level cache.
constexpr std::int64_t kElementTile = 512;
constexpr int kElementTensors = 16, kElementRooms = 16, kElementNumbers = 48, kElementSums = 8;

class ElementProgram {
 public:
  enum Kind { tensor, room, number, sum };
  using Place = std::pair<int, int>;  // kind, and which of them
  using Step = std::tuple<std::string, Place, std::vector<Place>>;
  using Row = std::tuple<std::int64_t, std::vector<std::size_t>, std::vector<py::ssize_t>>;
  using Words = py::array_t<std::uint32_t, py::array::c_style>;
  using Results = py::array_t<float, py::array::c_style>;
  using Tensors = std::array<float*, kElementTensors>;
  using Sums = std::array<double, kElementSums>;

  // `results` has the sums of each row, one row after the other.
  ElementProgram(const std::vector<Step>& steps, const std::vector<Row>& rows, Words words, std::size_t pointers,
                 Results results)
      : words_(std::move(words)),
        results_(std::move(results)),
        values_(words_.data()),
        totals_(results_.mutable_data()),
        pointers_(pointers),
        sums_(rows.empty() ? 0 : static_cast<std::size_t>(results_.size()) / rows.size()),
        plan_(elements(rows)) {
    in_range<std::size_t>("sums of a row", sums_, 0, kElementSums);
    if (static_cast<std::size_t>(results_.size()) != sums_ * rows.size()) {
      refuse("sums", "as many for each row", std::to_string(results_.size()));
    }
    for (const auto& [size, tensors, numbers] : rows) {
      in_range<std::size_t>("rows: tensors", tensors.size(), 1, kElementTensors);
      in_range<std::size_t>("rows: numbers", numbers.size(), 0, kElementNumbers);
      if (tensors.size() != std::get<1>(rows[0]).size() || numbers.size() != std::get<2>(rows[0]).size()) {
        refuse("rows", "of as many tensors and numbers each", "others");
      }
      in_range<std::int64_t>("rows: a size", size, 0, std::numeric_limits<std::int64_t>::max());
      for (const std::size_t i : tensors) in_range<std::size_t>("rows: a tensor", i, 0, pointers_ - 1);
      for (const py::ssize_t i : numbers) in_range<py::ssize_t>("rows: a word", i, 0, words_.size() - 1);
      plan_.add(rows_.size(), size, kElementTile);
      rows_.push_back({size, tensors, numbers, runs_});
      runs_ += static_cast<std::size_t>(size / kLeastGrain) + 1;
    }
    for (const Step& step : steps) add(step);
  }

  std::size_t rows() const { return rows_.size(); }
  std::size_t sums() const { return sums_; }
  std::size_t tensors() const { return rows_.empty() ? 0 : rows_[0].tensors.size(); }

  void run(const std::vector<std::uintptr_t>& pointers, int threads) const {
    in_range("threads", threads, 1, 1024);
    if (pointers.size() != pointers_) {
      refuse("pointers", std::to_string(pointers_) + ", one for each tensor", std::to_string(pointers.size()));
    }
    const py::gil_scoped_release release;
    const Loop loop = [&](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
      if (threads > 1) {
        Pool::instance().run(tasks, threads, body);
      } else {
        for (std::int64_t i = 0; i < tasks; ++i) body(i);
      }
    };
    std::vector<Sums> partials(sums_ > 0 ? runs_ : 0);
    // As torch's own operations, which these stand for.
    plan_.run(loop, Subnormals::keep, [&](const Piece& piece) {
      const Leaf& leaf = rows_[piece.tensor];
      Tensors at;
      for (std::size_t k = 0; k < leaf.tensors.size(); ++k) {
        at[k] = reinterpret_cast<float*>(pointers[leaf.tensors[k]]) + piece.begin;  // NOLINT: raw by contract
      }
      const Sums sums = run_row(piece.tensor, at, piece.end - piece.begin);
      if (sums_ > 0) partials[leaf.first_run + static_cast<std::size_t>(piece.begin / kLeastGrain)] = sums;
    });
    if (sums_ > 0) add_up(partials);
  }

  // A leaf's program over `size` elements of its tensors, which begin there; returns their sums.
  Sums run_row(std::size_t row, const Tensors& tensors, std::int64_t size) const {
    const Leaf& leaf = rows_[row];
    Sums sums{};
    Rooms own;
    for (std::size_t k = 0; k < leaf.numbers.size(); ++k) {
      float value;
      std::memcpy(&value, values_ + leaf.numbers[k], sizeof value);
      for (float& lane : own.numbers[k]) lane = value;
    }
    Tensors at, ends;
    for (std::int64_t begin = 0; begin < size; begin += kElementTile) {
      const std::int64_t n = std::min(size - begin, kElementTile), rest = n % kElementLanes;
      for (std::size_t k = 0; k < leaf.tensors.size(); ++k) at[k] = tensors[k] + begin;
      run_tile(at, own, n - rest, n - rest, sums);
      if (rest == 0) continue;
      const std::size_t bytes = static_cast<std::size_t>(rest) * sizeof(float);
      for (std::size_t k = 0; k < leaf.tensors.size(); ++k) {
        ends[k] = own.ends[k];
        std::memset(ends[k], 0, sizeof own.ends[k]);
        std::memcpy(ends[k], at[k] + (n - rest), bytes);
      }
      run_tile(ends, own, kElementLanes, rest, sums);
      for (const int k : written_) std::memcpy(at[k] + (n - rest), ends[k], bytes);
    }
    return sums;
  }

 private:
  struct ElementStep {
    ElementLoop* loop;  // none: a sum
    Place out;
    std::vector<Place> in;
  };

  struct Leaf {
    std::int64_t size;
    std::vector<std::size_t> tensors;
    std::vector<py::ssize_t> numbers;
    std::size_t first_run;  // where its partial sums begin, one for each `kLeastGrain` elements at most
  };

  // What a leaf's program reads and writes beside its tensors.
  struct Rooms {
    alignas(64) float rooms[kElementRooms][kElementTile];
    alignas(64) float ends[kElementTensors][kElementLanes];
    alignas(64) float numbers[kElementNumbers][kElementLanes];
  };

  static std::int64_t elements(const std::vector<Row>& rows) {
    std::int64_t sum = 0;
    for (const Row& row : rows) sum += std::get<0>(row);
    return sum;
  }

  void add(const Step& step) {
    const auto& [name, out, in] = step;
    if (name == "sum") return add_sum(out, in);
    const ElementOp* op = kernels_.element_ops;
    const ElementOp* const end = op + kElementOps;
    while (op != end && name != op->name) ++op;
    if (op == end) refuse("steps", "of `element_ops`", "'" + name + "'");
    if (in.size() != static_cast<std::size_t>(op->operands)) {
      refuse("steps: operands of " + name, std::to_string(op->operands), std::to_string(in.size()));
    }
    check(out, tensor, room);
    for (const Place& place : in) check(place, tensor, number);
    if (out.first == tensor) written_.push_back(out.second);
    steps_.push_back({op->loop, out, in});
  }

  void add_sum(const Place& out, const std::vector<Place>& in) {
    if (in.size() != 1) refuse("steps: operands of sum", "1", std::to_string(in.size()));
    check(in[0], tensor, room);
    check(out, sum, sum);
    steps_.push_back({nullptr, out, in});
  }

  void check(const Place& place, Kind first, Kind last) const {
    in_range<int>("steps: a kind of place", place.first, first, last);
    const auto numbers = rows_.empty() ? 0 : rows_[0].numbers.size();
    const int counts[] = {static_cast<int>(tensors()), kElementRooms, static_cast<int>(numbers),
                          static_cast<int>(sums_)};
    in_range("steps: a place", place.second, 0, counts[place.first] - 1);
  }

  // In ascending order of the runs: whichever thread was first.
  void add_up(const std::vector<Sums>& partials) const {
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      const std::size_t end = row + 1 < rows_.size() ? rows_[row + 1].first_run : runs_;
      for (std::size_t k = 0; k < sums_; ++k) {
        double total = 0;
        for (std::size_t i = rows_[row].first_run; i < end; ++i) total += partials[i][k];
        totals_[row * sums_ + k] = static_cast<float>(total);
      }
    }
  }

  // The operations on `n` elements, of which sums take the first `summed`.
  void run_tile(const Tensors& tensors, Rooms& own, std::int64_t n, std::int64_t summed, Sums& sums) const {
    const auto address = [&](const Place& place) {
      const auto k = static_cast<std::size_t>(place.second);
      return place.first == tensor ? tensors[k] : place.first == room ? own.rooms[k] : own.numbers[k];
    };
    for (const ElementStep& step : steps_) {
      const float* in[kElementOperands];
      std::int64_t moves[kElementOperands];
      for (std::size_t k = 0; k < step.in.size(); ++k) {
        in[k] = address(step.in[k]);
        moves[k] = step.in[k].first != number;
      }
      if (step.loop == nullptr) {
        sums[static_cast<std::size_t>(step.out.second)] += kernels_.element_sum(in[0], summed);
        continue;
      }
      step.loop(address(step.out), in, moves, n);
    }
  }

  Words words_;
  Results results_;
  const std::uint32_t* values_;
  float* totals_;
  std::size_t pointers_, sums_, runs_ = 0;
  const Kernels& kernels_ = kernels();
  std::vector<Leaf> rows_;
  std::vector<ElementStep> steps_;
  std::vector<int> written_;
  Plan plan_;
};

}  // namespace chainrule
