// The kernel over NumPy arrays and raw memory: many tensors a call, in place, without the GIL.
//
// A call first reads and checks everything it was given; only then is anything written.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "checks.hpp"
#include "doors.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

std::string type_of(py::handle value) { return py::str(py::type::of(value).attr("__name__")); }

// The memory of several tensors, checked once; `owners` keeps arrays alive.
class Buffers {
 public:
  Buffers(const py::object& tensors, const std::string& name) {
    if (!py::isinstance<py::sequence>(tensors) || py::isinstance<py::str>(tensors) ||
        py::isinstance<py::array>(tensors)) {
      refuse<WrongType>(name, "a sequence of arrays or (pointer, length, dtype) triples", type_of(tensors));
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
      refuse<WrongType>(where, "a NumPy array or a (pointer, length, dtype) triple", type_of(tensor),
                        "a torch tensor on the CPU is (t.data_ptr(), t.numel(), 'float32'), one on an accelerator has "
                        "no memory the kernel can reach");
    }
  }

  void add_array(const py::array& array, const std::string& where) {
    static const py::handle float32 = py::dtype::of<float>().release();
    const py::dtype dtype = array.dtype();
    const Element element = dtype.is(float32) ? Element::float32
                                              : element_of(std::string(py::str(dtype.attr("name"))), where);
    if (dtype.byteorder() == '>') refuse(where, "in the native byte order", "another");
    if ((array.flags() & py::array::c_style) == 0) {
      refuse(where, "C-contiguous", "another layout", "copy it with numpy.ascontiguousarray");
    }
    add_memory(const_cast<void*>(array.data()), array.size(), element, where);
    writeable.push_back(array.writeable());
    owners_.append(array);
  }

  void add_triple(const py::tuple& triple, const std::string& where) {
    if (!py::isinstance<py::int_>(triple[0]) || !py::isinstance<py::int_>(triple[1]) ||
        !py::isinstance<py::str>(triple[2])) {
      refuse<WrongType>(where, "a triple (pointer: int, length: int, dtype: str)", py::repr(triple));
    }
    // Python's integers have no bounds: -1 and an error set where one does not fit.
    const auto pointer = PyLong_AsUnsignedLongLong(triple[0].ptr());
    const auto length = PyErr_Occurred() != nullptr ? -1 : PyLong_AsLongLong(triple[1].ptr());
    PyErr_Clear();
    if (length < 0 || (pointer == 0 && length > 0)) {
      refuse(where, "a length of at least 0 at a pointer that is not null", py::repr(triple));
    }
    const Element element = element_of(triple[2].cast<std::string>(), where);
    add_memory(reinterpret_cast<void*>(pointer), length, element, where);  // NOLINT: raw by contract
    writeable.push_back(true);
  }

  void add_memory(void* data, std::int64_t size, Element element, const std::string& where) {
    static std::uint32_t nothing[1];  // an empty tensor is present, whatever its pointer
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    if (size > 0 && address % static_cast<std::uintptr_t>(element_size(element)) != 0) {
      refuse(where, "aligned: at a multiple of its element size", "address " + std::to_string(address));
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
      if (!array) refuse<WrongType>(name, "a number or one for each tensor", type_of(value));
      if (array.size() != 1 && (array.ndim() != 1 || array.size() != static_cast<py::ssize_t>(tensors))) {
        refuse(name, "one number or " + std::to_string(tensors) + ", one for each tensor",
               std::to_string(array.size()));
      }
      values_.assign(array.data(), array.data() + array.size());
    }
    for (const double x : values_) {
      if (!(std::isfinite(x) && x >= low && x <= high && !(low_excluded && x == low))) {
        refuse(name, "finite and in " + std::string(low_excluded ? "(" : "[") + shown(low) + ", " + shown(high) + "]",
               shown(x));
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
    threads_ = in_range("threads", threads, 0, 1024) > 0 ? threads : default_threads();
    kernels();  // a CHAINRULE_ISA that is wrong is an error now, not in a thread
  }

  // The tensors of a role; the first role sets how many there are.
  Role role(const py::object& tensors, const char* name, bool written, Holds holds = Holds::floats) {
    if (tensors.is_none()) refuse<WrongType>(name, "given", "None");
    return optional(tensors, name, written, holds);
  }

  // One that may be None.
  Role optional(const py::object& tensors, const char* name, bool written, Holds holds = Holds::floats) {
    if (tensors.is_none()) return {};
    const Buffers* parsed;
    if (py::isinstance<Buffers>(tensors)) {
      parsed = tensors.cast<const Buffers*>();
    } else {
      parsed = &owned_.emplace_back(tensors, name);
    }
    const std::size_t count = parsed->buffers.size();
    if (!tensors_) tensors_ = count;
    if (*tensors_ != count) {
      refuse(name, std::to_string(*tensors_) + " tensors, as in the other arguments", std::to_string(count));
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Buffer& b = parsed->buffers[i];
      require_holds(holds, b.element, name, i);
      if (written && !parsed->writeable[i]) {
        refuse(at(name, i), "writeable", "what is read-only", "pass a copy");
      }
      ranges_.push_back({reinterpret_cast<std::uintptr_t>(b.data), b.size * element_size(b.element), written,
                         name, i});
    }
    return {name, &parsed->buffers};
  }

  std::size_t tensors() const { return tensors_.value_or(0); }

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
        throw std::invalid_argument(at(other->name, other->index) + " and " + at(range.name, range.index) +
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

// What every step is given.
StepRoles step_roles(Call& call, const py::object& parameters, const py::object& gradients, const py::object& updates) {
  StepRoles roles;
  roles.gradients = call.role(gradients, "gradients", false);
  roles.updates = call.optional(updates, "updates", true);
  roles.parameters = call.optional(parameters, "parameters", !roles.updates);
  if (!roles.updates && !roles.parameters) refuse("parameters", "given", "None", "or `updates`, where the step goes");
  roles.require();
  for (std::size_t i = 0; i < roles.updates.size(); ++i) {
    const Buffer u = roles.updates[i], g = roles.gradients[i];
    if (u.data == g.data && u.element == g.element) call.allow_in_place(i);
  }
  return roles;
}

// Rates and decays of the steps that have no table.
struct Rates {
  Numbers rate, weight_decay;

  Rates(const Call& call, const StepRoles& roles, const py::object& rate_in, const py::object& decay_in)
      : rate(rate_in, "learning_rate", call.tensors(), -kInfinity, kInfinity),
        weight_decay(decay_in, "weight_decay", call.tensors(), -kInfinity, kInfinity) {
    for (std::size_t i = 0; i < call.tensors(); ++i) require_parameters(roles, weight_decay[i]);
  }

  static void require_parameters(const StepRoles& roles, double weight_decay) {
    if (!roles.parameters && weight_decay != 0) refuse("parameters", "given", "None", "weight_decay is not 0");
  }
};

// The numbers of a tier-2 step as given, in the order of `kTier2Numbers`, and its denominator.
struct Tier2Arguments {
  py::object numbers[std::size(kTier2Numbers)];
  std::string denominator;
};

std::vector<Tier2> tier2_tensors(Call& call, const StepRoles& roles, const Role& mu, const Role& mu_long,
                                 const py::object& nu, bool has_long, const Tier2Arguments& given) {
  std::vector<Numbers> columns;
  for (std::size_t k = 0; k < std::size(kTier2Numbers); ++k) {
    const Tier2Number& n = kTier2Numbers[k];
    columns.emplace_back(given.numbers[k], n.name, call.tensors(), n.low, n.high, n.low_excluded);
  }
  const Denominator denominator = denominator_of(given.denominator);
  auto tensors = tier2_of(roles, mu, mu_long, call.optional(nu, "nu", true), denominator,
                          [&](std::size_t k, std::size_t i) { return columns[k][i]; });
  for (const Tier2& t : tensors) {
    Rates::require_parameters(roles, t.weight_decay);
    if (!has_long && t.blend != 1) refuse("blend", "1 without a long EMA", shown(t.blend));
  }
  return tensors;
}

void tier2(const py::object& parameters, const py::object& gradients, const py::object& mu,
           const py::object& nu, const py::object& mu_long, const py::object& updates,
           const Tier2Arguments& given, int threads) {
  Call call(threads);
  const StepRoles roles = step_roles(call, parameters, gradients, updates);
  const Role mus = call.role(mu, "mu", true), longs = call.optional(mu_long, "mu_long", true);
  const auto tensors = tier2_tensors(call, roles, mus, longs, nu, static_cast<bool>(longs), given);
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_tier2(tensors, loop); });
}

// Codes and scales of tensors with the sizes of `values`; one size of blocks for all or one for each.
std::vector<Codes> codes_of(Call& call, const Role& values, const py::object& packed_in, const char* packed_name,
                            const py::object& scales_in, const char* scales_name, bool written,
                            const py::object& block_in, int bits) {
  const Numbers block(block_in, "block", call.tensors(), 1, 9.0e15);
  const Role packed = call.role(packed_in, packed_name, written, Holds::codes);
  const Role scales = call.role(scales_in, scales_name, written, Holds::singles);
  const auto whole = [&](std::size_t i) {
    if (block[i] != std::floor(block[i])) refuse("block", "an integer", shown(block[i]));
    return static_cast<std::int64_t>(block[i]);
  };
  return codes_of(packed, scales, values, whole, bits);
}

void tier2_quantized(const py::object& parameters, const py::object& gradients, const py::object& mu_codes,
                     const py::object& mu_scales, const py::object& nu, const py::object& mu_long_codes,
                     const py::object& mu_long_scales, const py::object& updates, const py::object& block,
                     int bits, const std::string& start, const Tier2Arguments& given, int threads) {
  const bool at_gradient = index_of({"zero", "gradient"}, start, "start") == 1;
  const bool has_long = !mu_long_codes.is_none();
  if (mu_long_scales.is_none() == has_long) {
    refuse("mu_long_codes and mu_long_scales", "both given or both None", "one of them");
  }
  Call call(threads);
  const StepRoles roles = step_roles(call, parameters, gradients, updates);
  const auto mu =
      codes_of(call, roles.gradients, mu_codes, "mu_codes", mu_scales, "mu_scales", true, block, bits);
  std::vector<Codes> longs(call.tensors());
  if (has_long) {
    longs = codes_of(call, roles.gradients, mu_long_codes, "mu_long_codes", mu_long_scales, "mu_long_scales", true,
                     block, bits);
  }
  const auto steps = tier2_tensors(call, roles, {}, {}, nu, has_long, given);
  std::vector<Tier2Quantized> tensors(steps.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {steps[i], mu[i], longs[i], at_gradient};
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_tier2_quantized(tensors, loop); });
}

void tier1(const py::object& parameters, const py::object& gradients, const py::object& magnitudes,
           const py::object& updates, const py::object& learning_rate, const py::object& weight_decay,
           const py::object& decay, bool scale_decay, const py::object& mean_magnitude, int threads) {
  Call call(threads);
  const StepRoles roles = step_roles(call, parameters, gradients, updates);
  const Role cs = call.role(magnitudes, "magnitudes", true, Holds::singles);
  require_sizes(cs, [](std::size_t) { return 1; });
  const std::size_t n = call.tensors();
  const Rates rates(call, roles, learning_rate, weight_decay);
  const Numbers decays(decay, "decay", n, 0, 1);
  std::optional<Numbers> means;
  if (!mean_magnitude.is_none()) means.emplace(mean_magnitude, "mean_magnitude", n, 0, kInfinity);
  std::vector<Tier1> tensors(n);
  for (std::size_t i = 0; i < n; ++i) {
    roles.fill(tensors[i].step, i, rates.rate[i], rates.weight_decay[i]);
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
  const StepRoles roles = step_roles(call, parameters, gradients, updates);
  const Rates rates(call, roles, learning_rate, weight_decay);
  std::vector<SignStep> tensors(call.tensors());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    roles.fill(tensors[i], i, rates.rate[i], rates.weight_decay[i]);
  }
  call.require_disjoint();
  call.without_gil([&](const Loop& loop) { run_sign(tensors, loop); });
}

py::array_t<double> statistics(const py::object& gradients, int threads) {
  Call call(threads);
  const Role role = call.role(gradients, "gradients", false);
  const auto totals = call.without_gil([&](const Loop& loop) { return run_statistics(*role.buffers, loop); });
  py::array_t<double> table({static_cast<py::ssize_t>(totals.size()), py::ssize_t{4}});
  double* row = table.mutable_data();
  for (const Statistics& s : totals) {
    for (const double value : {s.mean_magnitude, s.mean_square, s.variance, s.peak}) *row++ = value;
  }
  return table;
}

py::array_t<float> sums(const std::string& kind_name, const py::object& xs_in, const py::object& ys_in, double c,
                        int threads) {
  const SumKind kind = sum_kind_of(kind_name);
  if (is_of_pairs(kind) == ys_in.is_none()) {
    refuse("ys", ys_in.is_none() ? "given" : "None", type_of(ys_in), "kind is '" + kind_name + "'");
  }
  Call call(threads);
  const Role xs = call.role(xs_in, "xs", false), ys = call.optional(ys_in, "ys", false);
  require_like(ys, xs);
  std::vector<Summands> tensors(xs.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {xs[i], ys[i], static_cast<float>(c)};
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
  const Role role = call.role(values, "values", false);
  const auto coded = codes_of(call, role, codes, "codes", scales, "scales", true, block, bits);
  std::vector<Requantize> tensors(role.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {role[i], coded[i]};
  if (!keys.is_none()) {
    const auto words = py::array_t<std::uint32_t, py::array::c_style>::ensure(keys);
    if (!words || words.ndim() != 2 || words.shape(0) != static_cast<py::ssize_t>(tensors.size()) ||
        words.shape(1) != 2) {
      const std::string shape = words ? py::str(words.attr("shape")) : py::str(py::repr(keys));
      refuse("keys", "uint32 of shape (" + std::to_string(tensors.size()) + ", 2)", shape,
             "a Threefry key for each tensor");
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
  const Role role = call.role(values, "values", true);
  const auto coded = codes_of(call, role, codes, "codes", scales, "scales", false, block, bits);
  std::vector<Requantize> tensors(role.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {role[i], coded[i]};
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
              {{learning_rate, weight_decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction},
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
                        {{learning_rate, weight_decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction},
                         denominator},
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
