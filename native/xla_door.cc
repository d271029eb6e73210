// The kernel as XLA FFI handlers for the CPU: inside jit, on XLA's own intra-operation threads.
//
// A handler takes a (tensors, k) float32 table of numbers, then its roles one after another, each with
// all tensors. What it writes are results, and those that update an operand must share its memory
// (input_output_aliases). The wrappers in xla.py say in JAX's words what is wrong with shapes and dtypes; a
// handler that is called without them refuses what it would read or write beyond the end of.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <deque>
#include <iterator>
#include <sstream>
#include <string_view>
#include <vector>

#include "chainrule/batch.hpp"
#include "checks.hpp"
#include "doors.hpp"
#include "handlers.hpp"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace chainrule {
namespace {

Buffer buffer_of(const ffi::AnyBuffer& b, Holds holds, const char* name, std::size_t index = 0) {
  constexpr ffi::DataType kTypes[] = {ffi::DataType::F32, ffi::DataType::BF16, ffi::DataType::F16, ffi::DataType::U8};
  const auto* type = std::find(std::begin(kTypes), std::end(kTypes), b.element_type());
  std::ostringstream other;
  if (type == std::end(kTypes)) element_of((other << b.element_type(), other.str()), at(name, index));  // refuses
  const auto element = static_cast<Element>(type - kTypes);
  require_holds(holds, element, name, index);
  static std::uint32_t nothing[1];  // an empty tensor is present, whatever its pointer
  const auto size = static_cast<std::int64_t>(b.element_count());
  return {size > 0 ? b.untyped_data() : nothing, size, element};
}

void require(const char* where, std::int64_t wanted, std::int64_t got) {
  if (wanted != got) refuse(where, std::to_string(wanted), std::to_string(got));
}

// XLA takes large results fresh from the system, and touching them page by page for the first time costs
// several times what the step does: 42 ms against 7 ms for 80 MB, measured.
void prefer_huge_pages(const Buffer& buffer) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const auto start = reinterpret_cast<std::uintptr_t>(buffer.data);
  const std::uintptr_t end = start + static_cast<std::uintptr_t>(buffer.size * element_size(buffer.element));
  const std::uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Only advice: where it is refused, pages stay small.
  if (buffer.size > 0 && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A result that is written from scratch.
Role fresh(const Role& result) {
  for (std::size_t i = 0; i < result.size(); ++i) prefer_huge_pages(result[i]);
  return result;
}

// One call's operands and results, read role after role: each role is a run of `tensors` buffers.
class Roles {
 public:
  Roles(const ffi::RemainingArgs& operands, ffi::RemainingRets* results, std::int64_t tensors)
      : operands_(operands), results_(results), tensors_(static_cast<std::size_t>(tensors)) {}

  Role operand(const char* name, Holds holds = Holds::floats, bool present = true) {
    return role(name, present, [&](std::size_t i) {
      return buffer_of(*operands_.get<ffi::AnyBuffer>(next(next_operand_, operands_.size(), "operands")), holds, name,
                       i);
    });
  }

  Role result(const char* name, Holds holds = Holds::floats, bool present = true) {
    return role(name, present, [&](std::size_t i) {
      auto buffer = results_->get<ffi::AnyBuffer>(next(next_result_, results_->size(), "results"));
      return buffer_of(**buffer, holds, name, i);
    });
  }

  // An operand that the next result updates in place.
  Role updated(const char* name, Holds holds = Holds::floats, bool present = true) {
    const Role before = operand(name, holds, present), after = result(name, holds, present);
    require_like(after, before);
    for (std::size_t i = 0; i < before.size(); ++i) {
      if (before[i].data != after[i].data) refuse(at(name, i), "in the memory of its result", "a copy");
    }
    return after;
  }

  // No operand or result is left over.
  void require_all_read() const {
    require("number of operands", static_cast<std::int64_t>(next_operand_), static_cast<std::int64_t>(operands_.size()));
    if (results_ != nullptr) {
      require("number of results", static_cast<std::int64_t>(next_result_), static_cast<std::int64_t>(results_->size()));
    }
  }

 private:
  template <class Read>
  Role role(const char* name, bool present, Read read) {
    if (!present) return {};
    std::vector<Buffer>& buffers = buffers_.emplace_back();
    for (std::size_t i = 0; i < tensors_; ++i) buffers.push_back(read(i));
    return {name, &buffers};
  }

  static std::size_t next(std::size_t& position, std::size_t count, const char* where) {
    if (position >= count) refuse(where, "more for all roles", std::to_string(count));
    return position++;
  }

  const ffi::RemainingArgs& operands_;
  ffi::RemainingRets* results_;
  std::size_t tensors_, next_operand_ = 0, next_result_ = 0;
  std::deque<std::vector<Buffer>> buffers_;
};

using Table = ffi::Buffer<ffi::F32, 2>;
using Magnitudes = ffi::Buffer<ffi::F32, 1>;
using Keys = ffi::Buffer<ffi::U32, 2>;

constexpr const char* kTier1Numbers[] = {"learning_rate", "weight_decay", "decay", "mean_magnitude"};

StepRoles step_roles(Roles& roles) {
  StepRoles step;
  step.gradients = roles.operand("gradients");
  step.updates = fresh(roles.result("updates"));
  return step;
}

// The tensors of a tier-2 step, when all but the table is read.
std::vector<Tier2> tier2_tensors(const Table& table, const StepRoles& step, const Role& mu, const Role& mu_long,
                                 const Role& nu, Denominator denominator) {
  constexpr std::size_t kColumns = std::size(kTier2Numbers);
  require("columns of the table", kColumns, table.dimensions()[1]);
  return tier2_of(step, mu, mu_long, nu, denominator, [&](std::size_t k, std::size_t i) {
    return static_cast<double>(table.typed_data()[i * kColumns + k]);
  });
}

// Operands: table, gradients, mu, [mu_long], [nu], [parameters]. Results: updates, mu, [mu_long], [nu].
ffi::Error tier2(ffi::ThreadPool pool, Table table, ffi::RemainingArgs operands, ffi::RemainingRets results,
                 std::string_view denominator_name, bool has_long, bool has_parameters) {
  return checked([&] {
    Roles roles(operands, &results, table.dimensions()[0]);
    const Denominator denominator = denominator_of(denominator_name);
    StepRoles step = step_roles(roles);
    const Role mu = roles.updated("mu"), mu_long = roles.updated("mu_long", Holds::floats, has_long);
    const Role nu = roles.updated("nu", Holds::floats, denominator == Denominator::root);
    step.parameters = roles.operand("parameters", Holds::floats, has_parameters);
    roles.require_all_read();
    run_tier2(tier2_tensors(table, step, mu, mu_long, nu, denominator), loop_on(pool));
  });
}

// As tier2, with codes and scales in the place of mu and of mu_long.
ffi::Error tier2_quantized(ffi::ThreadPool pool, Table table, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, std::string_view denominator_name, bool has_long,
                           bool has_parameters, std::int64_t block, std::int32_t bits,
                           bool start_at_gradient) {
  return checked([&] {
    Roles roles(operands, &results, table.dimensions()[0]);
    const Denominator denominator = denominator_of(denominator_name);
    StepRoles step = step_roles(roles);
    const auto blocks = [block](std::size_t) { return block; };
    const auto codes = [&](const char* packed_name, const char* scales_name) {
      const Role packed = roles.updated(packed_name, Holds::codes);
      const Role scales = roles.updated(scales_name, Holds::singles);
      return codes_of(packed, scales, step.gradients, blocks, bits);
    };
    const auto mu = codes("mu_codes", "mu_scales");
    const auto longs = has_long ? codes("mu_long_codes", "mu_long_scales") : std::vector<Codes>(mu.size());
    const Role nu = roles.updated("nu", Holds::floats, denominator == Denominator::root);
    step.parameters = roles.operand("parameters", Holds::floats, has_parameters);
    roles.require_all_read();
    const auto steps = tier2_tensors(table, step, {}, {}, nu, denominator);
    std::vector<Tier2Quantized> tensors(steps.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {steps[i], mu[i], longs[i], start_at_gradient};
    run_tier2_quantized(tensors, loop_on(pool));
  });
}

// Operands: table (`kTier1Numbers`, the mean magnitude -1 where it is not known), magnitudes, gradients, [parameters].
// Results: magnitudes, updates.
ffi::Error tier1(ffi::ThreadPool pool, Table table, Magnitudes old_magnitudes,
                 ffi::RemainingArgs operands, ffi::Result<Magnitudes> magnitudes,
                 ffi::RemainingRets results, bool scale_decay, bool has_parameters) {
  return checked([&] {
    const std::int64_t count = table.dimensions()[0];
    Roles roles(operands, &results, count);
    StepRoles step = step_roles(roles);
    step.parameters = roles.operand("parameters", Holds::floats, has_parameters);
    roles.require_all_read();
    require("columns of the table", std::size(kTier1Numbers), table.dimensions()[1]);
    require("number of magnitudes", count, old_magnitudes.dimensions()[0]);
    require("number of new magnitudes", count, magnitudes->dimensions()[0]);
    step.require();
    std::vector<Tier1> tensors(step.gradients.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const float* numbers = table.typed_data() + std::size(kTier1Numbers) * i;
      Tier1& t = tensors[i];
      step.fill(t.step, i, static_cast<double>(numbers[0]), static_cast<double>(numbers[1]));
      t.magnitude = magnitudes->typed_data() + i;
      *t.magnitude = old_magnitudes.typed_data()[i];
      t.decay = static_cast<double>(numbers[2]);
      t.mean_magnitude = static_cast<double>(numbers[3]);
      t.scale_decay = scale_decay;
    }
    run_tier1(tensors, loop_on(pool));
  });
}

// Operands: gradients. Result: a row of mean |g|, mean g^2, variance and max |g| for each.
ffi::Error statistics(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::Result<Table> table) {
  return checked([&] {
    require("rows of the statistics", static_cast<std::int64_t>(operands.size()), table->dimensions()[0]);
    require("columns of the statistics", 4, table->dimensions()[1]);
    Roles roles(operands, nullptr, table->dimensions()[0]);
    const Role gradients = roles.operand("gradients");
    float* row = table->typed_data();
    for (const Statistics& s : run_statistics(*gradients.buffers, loop_on(pool))) {
      for (const double value : {s.mean_magnitude, s.mean_square, s.variance, s.peak}) {
        *row++ = static_cast<float>(value);
      }
    }
  });
}

// Operands: c, each x, then each y if the kind is of pairs. Result: (..., tensors, sums), the leading axes those that
// `vmap` gave every operand.
ffi::Error sums(ffi::ThreadPool pool, ffi::AnyBuffer c, ffi::RemainingArgs operands,
                ffi::Result<ffi::AnyBuffer> result, std::string_view name) {
  return checked([&] {
    const SumKind kind = sum_kind_of(name);
    const auto axes = result->dimensions();
    const Buffer cs = buffer_of(c, Holds::singles, "c"), table = buffer_of(*result, Holds::singles, "sums");
    if (axes.size() < 2) refuse("axes of the sums", "at least 2", std::to_string(axes.size()));
    require("columns of the sums", sum_count(kind), axes[axes.size() - 1]);
    const std::int64_t tensors = axes[axes.size() - 2];
    std::int64_t batch = 1;
    for (std::size_t i = 0; i + 2 < axes.size(); ++i) batch *= axes[i];
    require("number of c", batch, cs.size);
    Roles roles(operands, nullptr, tensors);
    const Role xs = roles.operand("xs"), ys = roles.operand("ys", Holds::floats, is_of_pairs(kind));
    roles.require_all_read();
    require_sizes(xs, [&](std::size_t i) { return batch == 0 ? xs[i].size : xs[i].size / batch * batch; });
    require_like(ys, xs);
    const auto part = [batch](const Buffer& buffer, std::int64_t index) {
      const std::int64_t size = buffer.size / batch, offset = index * size * element_size(buffer.element);
      return Buffer{static_cast<char*>(buffer.data) + offset, size, buffer.element};
    };
    std::vector<Summands> pairs;
    for (std::int64_t index = 0; index < batch; ++index) {
      for (std::size_t i = 0; i < xs.size(); ++i) {
        const Buffer y = ys ? part(ys[i], index) : Buffer{};
        pairs.push_back({part(xs[i], index), y, static_cast<const float*>(cs.data)[index]});
      }
    }
    auto* out = static_cast<float*>(table.data);
    for (const Sums& found : run_sums(kind, pairs, loop_on(pool))) {
      for (int k = 0; k < sum_count(kind); ++k) *out++ = static_cast<float>(found.of[k]);
    }
  });
}

// Operands: keys (one (0, 0) a tensor when rounding to nearest), values. Results: codes, scales.
ffi::Error quantize(ffi::ThreadPool pool, Keys keys, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, std::int64_t block, std::int32_t bits, bool stochastic) {
  return checked([&] {
    require("columns of the keys", 2, keys.dimensions()[1]);
    Roles roles(operands, &results, keys.dimensions()[0]);
    const Role values = roles.operand("values"), packed = fresh(roles.result("codes", Holds::codes));
    const Role scales = fresh(roles.result("scales", Holds::singles));
    roles.require_all_read();
    const auto codes = codes_of(packed, scales, values, [block](std::size_t) { return block; }, bits);
    std::vector<Requantize> tensors(values.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::uint32_t* key = keys.typed_data() + 2 * i;
      tensors[i] = {values[i], codes[i], stochastic, {key[0], key[1]}};
    }
    run_requantize(tensors, false, loop_on(pool));
  });
}

// Operands: codes, scales. Results: values.
ffi::Error dequantize(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                      std::int64_t block, std::int32_t bits) {
  return checked([&] {
    Roles roles(operands, &results, static_cast<std::int64_t>(results.size()));
    const Role packed = roles.operand("codes", Holds::codes), scales = roles.operand("scales", Holds::singles);
    const Role values = fresh(roles.result("values"));
    roles.require_all_read();
    const auto codes = codes_of(packed, scales, values, [block](std::size_t) { return block; }, bits);
    std::vector<Requantize> tensors(values.size());
    for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i] = {values[i], codes[i]};
    run_requantize(tensors, true, loop_on(pool));
  });
}

auto bound() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

auto tier2_bound() {
  return bound().Arg<Table>().RemainingArgs().RemainingRets().Attr<std::string_view>("denominator")
      .Attr<bool>("has_long").Attr<bool>("has_parameters");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(tier2_handler, tier2, tier2_bound());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tier2_quantized_handler, tier2_quantized,
    tier2_bound().Attr<std::int64_t>("block").Attr<std::int32_t>("bits").Attr<bool>("start_at_gradient"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    tier1_handler, tier1,
    bound().Arg<Table>().Arg<Magnitudes>().RemainingArgs().Ret<Magnitudes>().RemainingRets()
        .Attr<bool>("scale_decay").Attr<bool>("has_parameters"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(statistics_handler, statistics, bound().RemainingArgs().Ret<Table>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sums_handler, sums,
    bound().Arg<ffi::AnyBuffer>().RemainingArgs().Ret<ffi::AnyBuffer>().Attr<std::string_view>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    quantize_handler, quantize,
    bound().Arg<Keys>().RemainingArgs().RemainingRets()
        .Attr<std::int64_t>("block").Attr<std::int32_t>("bits").Attr<bool>("stochastic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    dequantize_handler, dequantize,
    bound().RemainingArgs().RemainingRets().Attr<std::int64_t>("block").Attr<std::int32_t>("bits"));

}  // namespace

py::dict xla_targets() {
  py::dict targets;
  const auto add = [&](const char* name, XLA_FFI_Handler* handler) {
    targets[name] = py::capsule(reinterpret_cast<void*>(handler));
  };
  add("chainrule_tier2", tier2_handler);
  add("chainrule_tier2_quantized", tier2_quantized_handler);
  add("chainrule_tier1", tier1_handler);
  add("chainrule_statistics", statistics_handler);
  add("chainrule_sums", sums_handler);
  add("chainrule_quantize", quantize_handler);
  add("chainrule_dequantize", dequantize_handler);
  add("chainrule_loops", loops_handler());
  return targets;
}

py::dict layout() {
  const auto names = [](const auto& array) {
    py::tuple found(std::size(array));
    for (std::size_t i = 0; i < std::size(array); ++i) found[i] = py::str(array[i]);
    return found;
  };
  py::tuple tier2(std::size(kTier2Numbers));
  for (std::size_t i = 0; i < std::size(kTier2Numbers); ++i) tier2[i] = py::str(kTier2Numbers[i].name);
  py::dict sums;
  py::list of_one;
  for (int kind = 0; kind < kSumKinds; ++kind) {
    sums[kSumNames[kind]] = sum_count(static_cast<SumKind>(kind));
    if (!is_of_pairs(static_cast<SumKind>(kind))) of_one.append(kSumNames[kind]);
  }
  return py::dict(py::arg("tier2") = tier2, py::arg("tier1") = names(kTier1Numbers),
                  py::arg("denominators") = names(kDenominatorNames), py::arg("sums") = sums,
                  py::arg("sums_of_one") = py::tuple(of_one));
}

}  // namespace chainrule
