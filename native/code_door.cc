// Tensors in codes, on raw memory: decoded, encoded, and a compiled function or a program in between, tile by tile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "checks.hpp"
#include "doors.hpp"
#include "element_program.hpp"
#include "invoke.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

// Elements that a call of the function works on: two moments, and the tensors beside them, in the first-level cache.
constexpr std::int64_t kSpan = 512;
// Tiles that a thread takes at a time.
constexpr std::int64_t kSpans = 64;

// How a tensor is held.
struct Format {
  int bits;
  std::int64_t block;
  bool logarithmic;

  Format(int bits_in, std::int64_t block_in, bool logarithmic_in)
      : bits(bits_in), block(block_in), logarithmic(logarithmic_in) {
    if (bits != 4 && bits != 8) refuse("bits", "4 or 8", std::to_string(bits));
    in_range<std::int64_t>("block", block, 1, std::int64_t{1} << 52);
  }

  Coding coding(Word codes, Word scales, std::int64_t size, Word key) const {
    const auto memory = [](Word word) { return reinterpret_cast<void*>(word); };  // NOLINT: raw by contract
    return {{{memory(codes), packed_size(size, bits), Element::uint8},
             {memory(scales), block_count(size, block), Element::float32},
             size,
             block,
             bits},
            logarithmic,
            static_cast<const std::int64_t*>(memory(key))};
  }

  // Two blocks are an even number of elements: no byte is shared.
  std::int64_t unit() const { return 2 * block; }
};

// Whole units, as many as are about so many elements.
std::int64_t step_of(std::int64_t unit, std::int64_t about) { return unit >= about ? unit : about / unit * unit; }

// body(begin, n) over parts of whole units.
template <class Body>
void over_parts(std::int64_t begin, std::int64_t end, std::int64_t unit, int threads, Body body) {
  in_range("threads", threads, 1, 1024);
  const py::gil_scoped_release release;
  const std::int64_t step = step_of(unit, kSpans * kSpan);
  Pool::instance().run((end - begin + step - 1) / step, threads, [&](std::int64_t task) {
    const std::int64_t first = begin + task * step;
    body(first, std::min(step, end - first));
  });
}

void decode(const Format& format, Word codes, Word scales, std::int64_t size, Word values, std::int64_t begin,
            std::int64_t end, int threads) {
  const Coding coding = format.coding(codes, scales, size, 0);
  auto* x = reinterpret_cast<float*>(values);  // NOLINT: raw by contract
  over_parts(begin, end, format.unit(), threads, [&](std::int64_t first, std::int64_t n) {
    kernels().decode_values(coding, first, n, x + (first - begin));
  });
}

void encode(const Format& format, Word codes, Word scales, std::int64_t size, Word values, Word key,
            std::int64_t begin, std::int64_t end, int threads) {
  const Coding coding = format.coding(codes, scales, size, key);
  const auto* x = reinterpret_cast<const float*>(values);  // NOLINT: raw by contract
  over_parts(begin, end, format.unit(), threads, [&](std::int64_t first, std::int64_t n) {
    kernels().encode_values(coding, first, n, x + (first - begin));
  });
}

// An argument of the function, or what is encoded.
struct Place {
  enum Kind : int { number, tensor, scratch, length };
  int kind;
  std::size_t index;       // of the number, the tensor, or the room for a tile
  std::int64_t item = 0;   // bytes of an element of a tensor; 0 for a scalar, which all tiles share
};

struct Coded {
  Format format;
  Place values;
  std::size_t codes, scales;
  std::int64_t key;  // -1: to nearest
};

// A call of the function for a tensor.
struct Row {
  std::int64_t size;
  std::vector<Place> arguments;
  std::vector<Coded> decoded, encoded;
};

// What computes a tile: the function at an address, or the row of a program, whose tensors are the arguments.
using Body = std::variant<Word, std::shared_ptr<ElementProgram>>;

class CodedLaunches {
 public:
  CodedLaunches(Body body, std::vector<Row> rows, std::vector<Word> numbers, std::size_t tensors)
      : body_(std::move(body)), rows_(std::move(rows)), numbers_(std::move(numbers)), tensors_(tensors) {
    if (body_ == Body(Word{0})) refuse("function", "the address of one", "null");
    if (const auto* program = std::get_if<1>(&body_)) check(**program);
    for (std::size_t i = 0; i < rows_.size(); ++i) check(rows_[i], at("rows", i));
  }

  void run(const std::vector<Word>& words, int threads) const {
    in_range("threads", threads, 1, 1024);
    if (words.size() != tensors_) {
      refuse("pointers", std::to_string(tensors_) + ", one for each tensor", std::to_string(words.size()));
    }
    const py::gil_scoped_release release;
    Pool::instance().run(static_cast<std::int64_t>(tasks_.size()), threads, [&](std::int64_t task) {
      const FloatMode mode(Subnormals::keep);  // on every thread alike
      const Task& own = tasks_[static_cast<std::size_t>(task)];
      const Row& row = rows_[own.row];
      for (std::int64_t begin = own.begin; begin < own.end; begin += own.step) {
        run_tile(row, words, begin, std::min(own.step, own.end - begin));
      }
    });
  }

 private:
  struct Task {
    std::size_t row;
    std::int64_t begin, end, step;
  };

  void check(const ElementProgram& program) const {
    if (program.rows() != rows_.size()) {
      refuse("function", "a program of " + std::to_string(rows_.size()) + " rows", std::to_string(program.rows()));
    }
    if (program.sums() > 0) refuse("function", "a program without sums", std::to_string(program.sums()));
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const auto is_float = [](const Place& place) {
        return place.kind == Place::scratch || (place.kind == Place::tensor && place.item == sizeof(float));
      };
      const std::vector<Place>& given = rows_[i].arguments;
      if (given.size() != program.tensors() || !std::all_of(given.begin(), given.end(), is_float)) {
        refuse(at("rows", i), "the " + std::to_string(program.tensors()) + " tensors of the program", "others");
      }
    }
  }

  void check(const Row& row, const std::string& where) {
    in_range<std::size_t>(where + ": its length", row.arguments.size(), 0, kArguments);
    std::int64_t unit = 2;
    const auto check_place = [&](const Place& place) {
      const std::size_t known[] = {numbers_.size(), tensors_, kArguments, 1};
      in_range(where + ": a kind", place.kind, 0, 3);
      const std::size_t count = known[place.kind];
      if (place.index >= count) refuse(where, "below " + std::to_string(count), std::to_string(place.index));
      if (place.kind == Place::scratch) rooms_ = std::max(rooms_, place.index + 1);
    };
    for (const Place& place : row.arguments) check_place(place);
    for (const auto* list : {&row.decoded, &row.encoded}) {
      for (const Coded& coded : *list) {
        check_place(coded.values);
        for (const std::size_t index : {coded.codes, coded.scales}) {
          if (index >= tensors_) refuse(where, "below " + std::to_string(tensors_), std::to_string(index));
        }
        if (coded.key >= static_cast<std::int64_t>(tensors_)) refuse(where, "a tensor", std::to_string(coded.key));
        // Blocks of one length, or of lengths that divide each other.
        const std::int64_t own = coded.format.unit(), longer = std::max(own, unit);
        if (longer % std::min(own, unit) != 0) refuse(where, "blocks that divide each other", std::to_string(own));
        unit = longer;
      }
    }
    const std::int64_t step = step_of(unit, kSpan);
    room_ = std::max(room_, step);
    const auto index = static_cast<std::size_t>(&row - rows_.data());
    for (std::int64_t begin = 0; begin < row.size; begin += kSpans * step) {
      tasks_.push_back({index, begin, std::min(begin + kSpans * step, row.size), step});
    }
  }

  void run_tile(const Row& row, const std::vector<Word>& words, std::int64_t begin, std::int64_t n) const {
    thread_local std::vector<float> scratch;
    // A multiple of the cache's lines apart, and aligned to one.
    const std::size_t room = (static_cast<std::size_t>(room_) + 15) / 16 * 16 + 16;
    if (scratch.size() < rooms_ * room + 16) scratch.resize(rooms_ * room + 16);
    const Word start = (reinterpret_cast<Word>(scratch.data()) + 63) / 64 * 64;
    const auto word = [&](const Place& place) -> Word {
      switch (place.kind) {
        case Place::number: return numbers_[place.index];
        case Place::tensor: return words[place.index] + static_cast<Word>(begin * place.item);
        case Place::scratch: return start + place.index * room * sizeof(float);
        default: return static_cast<Word>(n);
      }
    };
    const auto coding = [&](const Coded& coded) {
      const Word key = coded.key < 0 ? 0 : words[static_cast<std::size_t>(coded.key)];
      return coded.format.coding(words[coded.codes], words[coded.scales], row.size, key);
    };
    const auto values = [&](const Coded& coded) { return reinterpret_cast<float*>(word(coded.values)); };  // NOLINT
    for (const Coded& coded : row.decoded) kernels_.decode_values(coding(coded), begin, n, values(coded));
    if (const Word* function = std::get_if<Word>(&body_)) {
      std::array<Word, kArguments> arguments;
      for (std::size_t i = 0; i < row.arguments.size(); ++i) arguments[i] = word(row.arguments[i]);
      invoke(*function, arguments.data(), row.arguments.size());
    } else {
      ElementProgram::Tensors given;
      for (std::size_t i = 0; i < row.arguments.size(); ++i) {
        given[i] = reinterpret_cast<float*>(word(row.arguments[i]));  // NOLINT: raw by contract
      }
      std::get<1>(body_)->run_row(static_cast<std::size_t>(&row - rows_.data()), given, n);
    }
    for (const Coded& coded : row.encoded) kernels_.encode_values(coding(coded), begin, n, values(coded));
  }

  Body body_;
  std::vector<Row> rows_;
  std::vector<Word> numbers_;
  std::size_t tensors_, rooms_ = 0;
  std::int64_t room_ = 0;
  std::vector<Task> tasks_;
  const Kernels& kernels_ = kernels();
};

using PlaceTuple = std::tuple<int, std::size_t, std::int64_t>;
using CodedTuple = std::tuple<Format, PlaceTuple, std::size_t, std::size_t, std::int64_t>;
using RowTuple = std::tuple<std::int64_t, std::vector<PlaceTuple>, std::vector<CodedTuple>, std::vector<CodedTuple>>;

Place place_of(const PlaceTuple& given) { return {std::get<0>(given), std::get<1>(given), std::get<2>(given)}; }

std::vector<Coded> coded_of(const std::vector<CodedTuple>& given) {
  std::vector<Coded> found;
  for (const auto& [format, values, codes, scales, key] : given) {
    found.push_back({format, place_of(values), codes, scales, key});
  }
  return found;
}

CodedLaunches coded_launches(Body body, const std::vector<RowTuple>& given, std::vector<Word> numbers,
                             std::size_t tensors) {
  std::vector<Row> rows;
  for (const auto& [size, arguments, decoded, encoded] : given) {
    Row row{size, {}, coded_of(decoded), coded_of(encoded)};
    for (const PlaceTuple& argument : arguments) row.arguments.push_back(place_of(argument));
    rows.push_back(std::move(row));
  }
  return {std::move(body), std::move(rows), std::move(numbers), tensors};
}

}  // namespace

void add_code_door(py::module_& m) {
  using py::arg;
  py::class_<Format>(m, "Format")
      .def(py::init<int, std::int64_t, bool>(), arg("bits"), arg("block"), arg("logarithmic"))
      .def("decode", &decode, arg("codes"), arg("scales"), arg("size"), arg("values"), arg("begin"), arg("end"),
           arg("threads") = 1)
      .def("encode", &encode, arg("codes"), arg("scales"), arg("size"), arg("values"), arg("key"), arg("begin"),
           arg("end"), arg("threads") = 1);
  py::class_<CodedLaunches>(m, "CodedLaunches")
      .def(py::init(&coded_launches), arg("function"), arg("rows"), arg("numbers"), arg("tensors"))
      .def("run", &CodedLaunches::run, arg("pointers"), arg("threads") = 1);
}

}  // namespace chainrule
