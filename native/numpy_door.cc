// The kernel over NumPy arrays and raw memory: many tensors a call, in place, without the GIL.
//
// A call first reads and checks everything it was given; only then is anything written.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "doors.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::string at(const std::string& name, std::size_t index) {
  return name + "[" + std::to_string(index) + "]";
}

const char* name_of(Element element) {
  switch (element) {
    case Element::float32:
      return "float32";
    case Element::bfloat16:
      return "bfloat16";
    case Element::float16:
      return "float16";
    default:
      return "uint8";
  }
}

Element element_of(const std::string& dtype, const std::string& where) {
  for (const Element e : {Element::float32, Element::bfloat16, Element::float16, Element::uint8}) {
    if (dtype == name_of(e)) return e;
  }
  throw py::type_error(where + ": dtype must be float32, bfloat16, float16 or (for codes) uint8, got " +
                       dtype + "; cast it, or use the XLA form of the chain");
}

// The memory of several tensors, checked once; `owners` keeps arrays alive.
class Buffers {
 public:
  Buffers(const py::object& tensors, const std::string& name) {
    if (!py::isinstance<py::sequence>(tensors) || py::isinstance<py::str>(tensors) ||
        py::isinstance<py::array>(tensors)) {
      throw py::type_error(name + ": expected a sequence of arrays or (pointer, length, dtype) triples, got " +
                           std::string(py::str(py::type::of(tensors).attr("__name__"))));
    }
    for (const py::handle tensor : tensors) add(tensor, at(name, buffers.size()));
  }

  std::vector<Buffer> buffers;
  std::vector<bool> writeable;

 private:
  void add(py::handle tensor, const std::string& where) {
    if (py::isinstance<py::array>(tensor)) {
      add_array(py::reinterpret_borrow<py::array>(tensor), where);
    } else if (py::isinstance<py::tuple>(tensor) && py::len(tensor) == 3) {
      add_triple(py::reinterpret_borrow<py::tuple>(tensor), where);
    } else {
      throw py::type_error(
          where + ": expected a NumPy array or a (pointer, length, dtype) triple, got " +
          std::string(py::str(py::type::of(tensor).attr("__name__"))) +
          "; a torch tensor on the CPU is (t.data_ptr(), t.numel(), 'float32'), one on an accelerator has no "
          "memory the kernel can reach");
    }
  }

  void add_array(const py::array& array, const std::string& where) {
    static const py::handle float32 = py::dtype::of<float>().release();
    const py::dtype dtype = array.dtype();
    const Element element = dtype.is(float32) ? Element::float32
                                              : element_of(py::str(dtype.attr("name")), where);
    if (dtype.byteorder() == '>') throw py::value_error(where + ": must have the native byte order");
    if ((array.flags() & py::array::c_style) == 0) {
      throw py::value_error(where + ": must be C-contiguous; copy it with numpy.ascontiguousarray");
    }
    add_memory(const_cast<void*>(array.data()), array.size(), element, where);
    writeable.push_back(array.writeable());
    owners_.append(array);
  }

  void add_triple(const py::tuple& triple, const std::string& where) {
    if (!py::isinstance<py::int_>(triple[0]) || !py::isinstance<py::int_>(triple[1]) ||
        !py::isinstance<py::str>(triple[2])) {
      throw py::type_error(where + ": a triple is (pointer: int, length: int, dtype: str)");
    }
    // Python's integers have no bounds: -1 and an error set where one does not fit.
    const auto pointer = PyLong_AsUnsignedLongLong(triple[0].ptr());
    const auto length = PyErr_Occurred() != nullptr ? -1 : PyLong_AsLongLong(triple[1].ptr());
    PyErr_Clear();
    if (length < 0 || (pointer == 0 && length > 0)) {
      throw py::value_error(where + ": needs a length of at least 0 and a pointer that is not null");
    }
    const Element element = element_of(triple[2].cast<std::string>(), where);
    add_memory(reinterpret_cast<void*>(pointer), length, element, where);  // NOLINT: raw by contract
    writeable.push_back(true);
  }

  void add_memory(void* data, std::int64_t size, Element element, const std::string& where) {
    static std::uint32_t nothing[1];  // an empty tensor is present, whatever its pointer
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    if (size > 0 && address % static_cast<std::uintptr_t>(element_size(element)) != 0) {
      throw py::value_error(where + ": misaligned: its address is not a multiple of its element size");
    }
    buffers.push_back({size > 0 ? data : nothing, size, element});
  }

  py::list owners_;
};

// A number for all tensors or one for each.
class Numbers {
 public:
  Numbers(const py::object& value, const char* name, std::size_t tensors, double low, double high,
          bool low_excluded = false) {
    if (py::isinstance<py::float_>(value) || py::isinstance<py::int_>(value)) {
      values_.push_back(PyFloat_AsDouble(value.ptr()));
      if (PyErr_Occurred() != nullptr) {  // an integer beyond the largest float
        PyErr_Clear();
        values_.back() = kInfinity;
      }
    } else {
      const auto array = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(value);
      if (!array) throw py::type_error(std::string(name) + ": expected a number or one for each tensor");
      if (array.size() != 1 && (array.ndim() != 1 || array.size() != static_cast<py::ssize_t>(tensors))) {
        throw py::value_error(std::string(name) + ": expected one number or " + std::to_string(tensors) +
                              ", one for each tensor, got " + std::to_string(array.size()));
      }
      values_.assign(array.data(), array.data() + array.size());
    }
    for (const double x : values_) {
      if (!(std::isfinite(x) && x >= low && x <= high && !(low_excluded && x == low))) {
        const auto bound = [](double b) { return std::string(py::str(py::float_(b))); };
        throw py::value_error(std::string(name) + ": must be finite and in " + (low_excluded ? "(" : "[") +
                              bound(low) + ", " + bound(high) + "], got " + bound(x));
      }
    }
  }

  double operator[](std::size_t i) const { return values_.size() == 1 ? values_[0] : values_[i]; }

 private:
  std::vector<double> values_;
};

// The buffers of one call by role, and the checks that concern several of them.
class Call {
 public:
  explicit Call(int threads) {
    if (threads < 0 || threads > 1024) {
      throw py::value_error("threads: must be in [0, 1024], 0 for the default, got " + std::to_string(threads));
    }
    threads_ = threads > 0 ? threads : default_threads();
    kernels();  // a CHAINRULE_ISA that is wrong is an error now, not in a thread
  }

  // The role's buffers; the first role sets how many tensors there are. None is absent.
  const std::vector<Buffer>* role(const py::object& tensors, const char* name, bool written,
                                  bool codes = false) {
    if (tensors.is_none()) return nullptr;
    const Buffers* parsed;
    if (py::isinstance<Buffers>(tensors)) {
      parsed = tensors.cast<const Buffers*>();
    } else {
      parsed = &owned_.emplace_back(tensors, name);
    }
    const std::size_t count = parsed->buffers.size();
    if (!tensors_) tensors_ = count;
    if (*tensors_ != count) {
      throw py::value_error(std::string(name) + ": expected " + std::to_string(*tensors_) +
                            " tensors, as in the other arguments, got " + std::to_string(count));
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Buffer& b = parsed->buffers[i];
      if ((b.element == Element::uint8) != codes) {
        throw py::type_error(at(name, i) + ": dtype must be " +
                             (codes ? "uint8" : "float32, bfloat16 or float16") + ", got " + name_of(b.element));
      }
      if (written && !parsed->writeable[i]) {
        throw py::value_error(at(name, i) + ": is read-only, and the kernel writes it; pass a copy");
      }
      ranges_.push_back({reinterpret_cast<std::uintptr_t>(b.data), b.size * element_size(b.element), written,
                         name, i});
    }
    return &parsed->buffers;
  }

  const std::vector<Buffer>& needed_role(const py::object& tensors, const char* name, bool written,
                                         bool codes = false) {
    const auto* buffers = role(tensors, name, written, codes);
    if (buffers == nullptr) throw py::type_error(std::string(name) + ": must not be None");
    return *buffers;
  }

  std::size_t tensors() const { return tensors_.value_or(0); }

  // Every tensor of the role has the length that `expected(i)` gives.
  template <class Expected>
  static void require_sizes(const std::vector<Buffer>* role, const char* name, Expected expected) {
    if (role == nullptr) return;
    for (std::size_t i = 0; i < role->size(); ++i) {
      if ((*role)[i].size != expected(i)) {
        throw py::value_error(at(name, i) + ": expected " + std::to_string(expected(i)) + " elements, got " +
                              std::to_string((*role)[i].size));
      }
    }
  }

  static void require_float32(const std::vector<Buffer>& role, const char* name) {
    for (std::size_t i = 0; i < role.size(); ++i) {
      if (role[i].element != Element::float32) {
        throw py::type_error(at(name, i) + ": dtype must be float32, got " + name_of(role[i].element));
      }
    }
  }

  // The i-th tensor of the first role is written under another name, in exactly its own memory.
  void allow_in_place(std::size_t i) { ranges_[i].bytes = 0; }

  // No memory that is written is also something else.
  void require_disjoint() {
    const auto empty = [](const Range& range) { return range.bytes == 0; };
    ranges_.erase(std::remove_if(ranges_.begin(), ranges_.end(), empty), ranges_.end());
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.start < b.start; });
    const Range* furthest = nullptr;
    const Range* furthest_written = nullptr;
    for (const Range& range : ranges_) {
      const Range* other = range.written ? furthest : furthest_written;
      if (other != nullptr && range.start < other->end()) {
        throw py::value_error(at(other->name, other->index) + " and " + at(range.name, range.index) +
                              " overlap in memory, and one of them is written");
      }
      if (furthest == nullptr || range.end() > furthest->end()) furthest = &range;
      if (range.written && (furthest_written == nullptr || range.end() > furthest_written->end())) {
        furthest_written = &range;
      }
    }
  }

  template <class Function>
  auto without_gil(Function function) const {
    const int threads = threads_;
    const py::gil_scoped_release release;
    return function([threads](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
      Pool::instance().run(tasks, threads, body);
    });
  }

 private:
  struct Range {
    std::uintptr_t start;
    std::int64_t bytes;
    bool written;
    const char* name;
    std::size_t index;
    std::uintptr_t end() const { return start + static_cast<std::uintptr_t>(bytes); }
  };

  int threads_ = 1;
  std::optional<std::size_t> tensors_;
  std::deque<Buffers> owned_;
  std::vector<Range> ranges_;
};

Buffer pick(const std::vector<Buffer>* role, std::size_t i) { return role == nullptr ? Buffer{} : (*role)[i]; }

// The roles that every step has: what is read, and where the step goes.
struct StepRoles {
  const std::vector<Buffer>*gradients, *parameters, *updates;

  StepRoles(Call& call, const py::object& parameters_in, const py::object& gradients_in,
            const py::object& updates_in) {
    gradients = &call.needed_role(gradients_in, "gradients", false);
    updates = call.role(updates_in, "updates", true);
    parameters = call.role(parameters_in, "parameters", updates == nullptr);
    if (updates == nullptr && parameters == nullptr) {
      throw py::value_error("parameters: needed, unless `updates` says where to write the step");
    }
    sizes(parameters, "parameters");
    sizes(updates, "updates");
    for (std::size_t i = 0; updates != nullptr && i < updates->size(); ++i) {
      const Buffer &u = (*updates)[i], &g = (*gradients)[i];
      if (u.data == g.data && u.element == g.element) call.allow_in_place(i);
    }
  }

  void sizes(const std::vector<Buffer>* role, const char* name) const {
    Call::require_sizes(role, name, [&](std::size_t i) { return (*gradients)[i].size; });
  }

  // The part of a tensor's description that every step has.
  template <class Step>
  void fill(Step& step, std::size_t i, const Numbers& learning_rate, const Numbers& weight_decay) const {
    if (parameters == nullptr && weight_decay[i] != 0) {
      throw py::value_error("parameters: needed when weight_decay is not 0");
    }
    step.parameter = pick(parameters, i);
    step.gradient = (*gradients)[i];
    step.output = pick(updates, i);
    step.rate = learning_rate[i];
    step.weight_decay = weight_decay[i];
  }
};

Denominator denominator_of(const std::string& name) {
  const int found = index_of(kDenominatorNames, name);
  if (found >= 0) return static_cast<Denominator>(found);
  throw py::value_error("denominator: must be 'root', 'magnitude' or 'none', got '" + name + "'");
}

// What a tier-2 step takes besides its buffers, as given.
struct Tier2Arguments {
  py::object learning_rate, weight_decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction;
  std::string denominator;
};

// The tensors of a tier-2 step, all but its first moments.
std::vector<Tier2> tier2_tensors(Call& call, const StepRoles& roles, const py::object& nu_in, bool has_long,
                                 const Tier2Arguments& given) {
  const std::size_t n = call.tensors();
  const Denominator denominator = denominator_of(given.denominator);
  const auto* nu = call.role(nu_in, "nu", true);
  if ((nu != nullptr) != (denominator == Denominator::root)) {
    throw py::value_error(std::string("nu: ") + (nu == nullptr ? "needed" : "must be None") +
                          " when denominator is '" + given.denominator + "'");
  }
  roles.sizes(nu, "nu");
  const Numbers rate(given.learning_rate, "learning_rate", n, -kInfinity, kInfinity);
  const Numbers weight_decay(given.weight_decay, "weight_decay", n, -kInfinity, kInfinity);
  const Numbers b1(given.b1, "b1", n, 0, 1), b1_long(given.b1_long, "b1_long", n, 0, 1);
  const Numbers blend(given.blend, "blend", n, 0, 1);
  const Numbers b2(given.b2, "b2", n, 0, 1), eps(given.eps, "eps", n, 0, kInfinity);
  const Numbers mu_correction(given.mu_correction, "mu_correction", n, 0, kInfinity, true);
  const Numbers nu_correction(given.nu_correction, "nu_correction", n, 0, kInfinity, true);
  std::vector<Tier2> tensors(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (!has_long && blend[i] != 1) throw py::value_error("blend: must be 1 without a long EMA");
    Tier2& t = tensors[i];
    roles.fill(t, i, rate, weight_decay);
    t.nu = pick(nu, i);
    t.denominator = denominator;
    t.b1 = b1[i];
    t.b1_long = b1_long[i];
    t.blend = blend[i];
    t.b2 = b2[i];
    t.eps = eps[i];
    t.mu_correction = mu_correction[i];
    t.nu_correction = nu_correction[i];
  }
  return tensors;
}

void tier2(const py::object& parameters, const py::object& gradients, const py::object& mu,
           const py::object& nu, const py::object& mu_long, const py::object& updates,
           const Tier2Arguments& given, int threads) {
  Call call(threads);
  const StepRoles roles(call, parameters, gradients, updates);
  const auto& mus = call.needed_role(mu, "mu", true);
  const auto* longs = call.role(mu_long, "mu_long", true);
  roles.sizes(&mus, "mu");
  roles.sizes(longs, "mu_long");
  std::vector<Tier2> tensors = tier2_tensors(call, roles, nu, longs != nullptr, given);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].mu = mus[i];
    tensors[i].mu_long = pick(longs, i);
  }
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_tier2(tensors, loop); });
}

// One block size for all tensors or one for each, and the bits of a code.
class Blocks {
 public:
  Blocks(const Call& call, const py::object& block, int bits)
      : block_(block, "block", call.tensors(), 1, 9.0e15), bits_(bits) {
    if (bits != 4 && bits != 8) throw py::value_error("bits: must be 4 or 8, got " + std::to_string(bits));
    for (std::size_t i = 0; i < call.tensors(); ++i) {
      if (block_[i] != std::floor(block_[i])) throw py::value_error("block: must be an integer");
    }
  }

  // Codes and scales of tensors with the sizes of `values`.
  std::vector<Codes> codes(Call& call, const std::vector<Buffer>& values, const py::object& packed_in,
                           const char* packed_name, const py::object& scales_in, const char* scales_name,
                           bool written) const {
    const auto& packed = call.needed_role(packed_in, packed_name, written, true);
    const auto& scales = call.needed_role(scales_in, scales_name, written);
    Call::require_float32(scales, scales_name);
    std::vector<Codes> result(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      // A block beyond the tensor's end is the whole tensor.
      const double size = static_cast<double>(std::max<std::int64_t>(values[i].size, 1));
      const auto block = static_cast<std::int64_t>(std::min(block_[i], size));
      result[i] = {packed[i], scales[i], values[i].size, block, bits_};
    }
    Call::require_sizes(&packed, packed_name,
                        [&](std::size_t i) { return packed_size(values[i].size, bits_); });
    Call::require_sizes(&scales, scales_name,
                        [&](std::size_t i) { return block_count(values[i].size, result[i].block); });
    return result;
  }

 private:
  Numbers block_;
  int bits_;
};

void tier2_quantized(const py::object& parameters, const py::object& gradients, const py::object& mu_codes,
                     const py::object& mu_scales, const py::object& nu, const py::object& mu_long_codes,
                     const py::object& mu_long_scales, const py::object& updates, const py::object& block,
                     int bits, const std::string& start, const Tier2Arguments& given, int threads) {
  if (start != "zero" && start != "gradient") {
    throw py::value_error("start: must be 'zero' or 'gradient', got '" + start + "'");
  }
  if (mu_long_codes.is_none() != mu_long_scales.is_none()) {
    throw py::value_error("mu_long_codes and mu_long_scales: give both or neither");
  }
  Call call(threads);
  const StepRoles roles(call, parameters, gradients, updates);
  const Blocks blocks(call, block, bits);
  const auto mu = blocks.codes(call, *roles.gradients, mu_codes, "mu_codes", mu_scales, "mu_scales", true);
  std::vector<Codes> longs(call.tensors());
  const bool has_long = !mu_long_codes.is_none();
  if (has_long) {
    longs = blocks.codes(call, *roles.gradients, mu_long_codes, "mu_long_codes", mu_long_scales,
                         "mu_long_scales", true);
  }
  const std::vector<Tier2> steps = tier2_tensors(call, roles, nu, has_long, given);
  std::vector<Tier2Quantized> tensors(steps.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {steps[i], mu[i], longs[i], start == "gradient"};
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_tier2_quantized(tensors, loop); });
}

void tier1(const py::object& parameters, const py::object& gradients, const py::object& magnitudes,
           const py::object& updates, const py::object& learning_rate, const py::object& weight_decay,
           const py::object& decay, bool scale_decay, const py::object& mean_magnitude, int threads) {
  Call call(threads);
  const StepRoles roles(call, parameters, gradients, updates);
  const auto& cs = call.needed_role(magnitudes, "magnitudes", true);
  Call::require_float32(cs, "magnitudes");
  Call::require_sizes(&cs, "magnitudes", [](std::size_t) { return 1; });
  const std::size_t n = call.tensors();
  const Numbers rate(learning_rate, "learning_rate", n, -kInfinity, kInfinity);
  const Numbers weight(weight_decay, "weight_decay", n, -kInfinity, kInfinity);
  const Numbers decays(decay, "decay", n, 0, 1);
  std::optional<Numbers> means;
  if (!mean_magnitude.is_none()) means.emplace(mean_magnitude, "mean_magnitude", n, 0, kInfinity);
  std::vector<Tier1> tensors(n);
  for (std::size_t i = 0; i < n; ++i) {
    roles.fill(tensors[i].step, i, rate, weight);
    tensors[i].magnitude = static_cast<float*>(cs[i].data);
    tensors[i].decay = decays[i];
    tensors[i].scale_decay = scale_decay;
    if (means) tensors[i].mean_magnitude = (*means)[i];
  }
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_tier1(tensors, loop); });
}

void tier0(const py::object& parameters, const py::object& gradients, const py::object& updates,
           const py::object& learning_rate, const py::object& weight_decay, int threads) {
  Call call(threads);
  const StepRoles roles(call, parameters, gradients, updates);
  const std::size_t n = call.tensors();
  const Numbers rate(learning_rate, "learning_rate", n, -kInfinity, kInfinity);
  const Numbers weight(weight_decay, "weight_decay", n, -kInfinity, kInfinity);
  std::vector<SignStep> tensors(n);
  for (std::size_t i = 0; i < n; ++i) roles.fill(tensors[i], i, rate, weight);
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_sign(tensors, loop); });
}

py::array_t<double> statistics(const py::object& gradients, int threads) {
  Call call(threads);
  const auto& buffers = call.needed_role(gradients, "gradients", false);
  const auto totals = call.without_gil([&](const Loop& loop) { return run_statistics(buffers, loop); });
  py::array_t<double> table({static_cast<py::ssize_t>(totals.size()), py::ssize_t{4}});
  double* row = table.mutable_data();
  for (const Statistics& s : totals) {
    for (const double value : {s.mean_magnitude, s.mean_square, s.variance, s.peak}) *row++ = value;
  }
  return table;
}

SumKind sum_kind_of(const std::string& name) {
  const int found = index_of(kSumNames, name);
  if (found >= 0) return static_cast<SumKind>(found);
  std::string known;
  for (const char* kind : kSumNames) known += (known.empty() ? "" : ", ") + std::string(kind);
  throw py::value_error("kind: must be one of " + known + ", got " + name);
}

py::array_t<float> sums(const std::string& kind_name, const py::object& xs_in, const py::object& ys_in, double c,
                        int threads) {
  const SumKind kind = sum_kind_of(kind_name);
  if (is_of_pairs(kind) == ys_in.is_none()) {
    throw py::value_error("ys: must " + std::string(is_of_pairs(kind) ? "not " : "") + "be None for '" +
                          kind_name + "'");
  }
  Call call(threads);
  const auto& xs = call.needed_role(xs_in, "xs", false);
  const auto* ys = call.role(ys_in, "ys", false);
  Call::require_sizes(ys, "ys", [&](std::size_t i) { return xs[i].size; });
  std::vector<Summands> tensors(xs.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {xs[i], pick(ys, i), static_cast<float>(c)};
  const auto totals = call.without_gil([&](const Loop& loop) { return run_sums(kind, tensors, loop); });
  py::array_t<float> table(
      {static_cast<py::ssize_t>(totals.size()), static_cast<py::ssize_t>(sum_count(kind))});
  float* out = table.mutable_data();
  for (const Sums& found : totals) {
    for (int k = 0; k < sum_count(kind); ++k) *out++ = static_cast<float>(found.of[k]);
  }
  return table;
}

void quantize(const py::object& values, const py::object& codes, const py::object& scales,
              const py::object& block, int bits, const py::object& keys, int threads) {
  Call call(threads);
  const auto& buffers = call.needed_role(values, "values", false);
  const auto coded = Blocks(call, block, bits).codes(call, buffers, codes, "codes", scales, "scales", true);
  std::vector<Requantize> tensors(buffers.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {buffers[i], coded[i]};
  if (!keys.is_none()) {
    const auto words = py::array_t<std::uint32_t, py::array::c_style>::ensure(keys);
    if (!words || words.ndim() != 2 || words.shape(0) != static_cast<py::ssize_t>(tensors.size()) ||
        words.shape(1) != 2) {
      throw py::value_error("keys: expected uint32 of shape (" + std::to_string(tensors.size()) +
                            ", 2), a Threefry key for each tensor");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].stochastic = true;
      tensors[i].key[0] = words.at(i, 0);
      tensors[i].key[1] = words.at(i, 1);
    }
  }
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_requantize(tensors, false, loop); });
}

void dequantize(const py::object& codes, const py::object& scales, const py::object& values,
                const py::object& block, int bits, int threads) {
  Call call(threads);
  const auto& buffers = call.needed_role(values, "values", true);
  const auto coded = Blocks(call, block, bits).codes(call, buffers, codes, "codes", scales, "scales", false);
  std::vector<Requantize> tensors(buffers.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {buffers[i], coded[i]};
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_requantize(tensors, true, loop); });
}

}  // namespace

void add_numpy_door(py::module_& m) {
  using py::arg;
  const py::none none;
  const py::kw_only kw;
  py::class_<Buffers>(m, "Buffers", "Tensors read and checked once, for use in many calls.")
      .def(py::init([](const py::object& tensors, const std::string& name) { return Buffers(tensors, name); }),
           arg("tensors"), arg("name") = "buffers")
      .def("__len__", [](const Buffers& self) { return self.buffers.size(); });
  m.def(
      "tier2",
      [](const py::object& parameters, const py::object& gradients, const py::object& mu, const py::object& nu,
         const py::object& mu_long, const py::object& updates, const py::object& learning_rate,
         const py::object& weight_decay, const py::object& b1, const py::object& b1_long,
         const py::object& blend, const py::object& b2, const py::object& eps, const py::object& mu_correction,
         const py::object& nu_correction, const std::string& denominator, int threads) {
        tier2(parameters, gradients, mu, nu, mu_long, updates,
              {learning_rate, weight_decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction,
               denominator},
              threads);
      },
      arg("parameters"), arg("gradients"), arg("mu"), arg("nu"), kw, arg("mu_long") = none,
      arg("updates") = none, arg("learning_rate"), arg("weight_decay") = 0.0, arg("b1"), arg("b1_long") = 0.0,
      arg("blend") = 1.0, arg("b2"), arg("eps"), arg("mu_correction") = 1.0, arg("nu_correction") = 1.0,
      arg("denominator") = "root", arg("threads") = 0);
  m.def(
      "tier2_quantized",
      [](const py::object& parameters, const py::object& gradients, const py::object& mu_codes,
         const py::object& mu_scales, const py::object& nu, const py::object& mu_long_codes,
         const py::object& mu_long_scales, const py::object& updates, const py::object& block, int bits,
         const std::string& start, const py::object& learning_rate, const py::object& weight_decay,
         const py::object& b1, const py::object& b1_long, const py::object& blend, const py::object& b2,
         const py::object& eps, const py::object& mu_correction, const py::object& nu_correction,
         const std::string& denominator, int threads) {
        tier2_quantized(parameters, gradients, mu_codes, mu_scales, nu, mu_long_codes, mu_long_scales, updates,
                        block, bits, start,
                        {learning_rate, weight_decay, b1, b1_long, blend, b2, eps, mu_correction,
                         nu_correction, denominator},
                        threads);
      },
      arg("parameters"), arg("gradients"), arg("mu_codes"), arg("mu_scales"), arg("nu"), kw,
      arg("mu_long_codes") = none, arg("mu_long_scales") = none, arg("updates") = none, arg("block"),
      arg("bits") = 4, arg("start") = "zero", arg("learning_rate"), arg("weight_decay") = 0.0, arg("b1"),
      arg("b1_long") = 0.0, arg("blend") = 1.0, arg("b2"), arg("eps"), arg("mu_correction") = 1.0,
      arg("nu_correction") = 1.0, arg("denominator") = "root", arg("threads") = 0);
  m.def("tier1", &tier1, arg("parameters"), arg("gradients"), arg("magnitudes"), kw, arg("updates") = none,
        arg("learning_rate"), arg("weight_decay") = 0.0, arg("decay"), arg("scale_decay") = false,
        arg("mean_magnitude") = none, arg("threads") = 0);
  m.def("tier0", &tier0, arg("parameters"), arg("gradients"), kw, arg("updates") = none, arg("learning_rate"),
        arg("weight_decay") = 0.0, arg("threads") = 0);
  m.def("statistics", &statistics, arg("gradients"), kw, arg("threads") = 0);
  m.def("sums", &sums, arg("kind"), arg("xs"), arg("ys") = none, kw, arg("c") = 1.0, arg("threads") = 0);
  m.def("quantize", &quantize, arg("values"), arg("codes"), arg("scales"), kw, arg("block"), arg("bits") = 4,
        arg("keys") = none, arg("threads") = 0);
  m.def("dequantize", &dequantize, arg("codes"), arg("scales"), arg("values"), kw, arg("block"),
        arg("bits") = 4, arg("threads") = 0);
}

}  // namespace chainrule
