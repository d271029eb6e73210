// The kernel as XLA FFI handlers for the CPU: inside jit, on XLA's own intra-operation threads.
//
// A handler takes a (tensors, k) float32 table of numbers, then its roles one after another, each with
// all tensors. What it writes are results, and those that update an operand must share its memory
// (input_output_aliases). The wrappers in xla.py name what is wrong with shapes and dtypes; a handler that
// is called without them refuses what it would read or write beyond the end of.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <iterator>
#include <optional>
#include <string_view>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "doors.hpp"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace chainrule {
namespace {

Buffer buffer_of(const ffi::AnyBuffer& b) {
  const ffi::DataType type = b.element_type();
  const Element element = type == ffi::DataType::BF16  ? Element::bfloat16
                          : type == ffi::DataType::F16 ? Element::float16
                          : type == ffi::DataType::U8  ? Element::uint8
                                                       : Element::float32;
  static std::uint32_t nothing[1];  // an empty tensor is present, whatever its pointer
  const auto size = static_cast<std::int64_t>(b.element_count());
  return {size > 0 ? b.untyped_data() : nothing, size, element};
}

enum class Holds { floats, singles, bytes };

bool holds_of(ffi::DataType type, Holds holds) {
  if (holds == Holds::bytes) return type == ffi::DataType::U8;
  const bool half = type == ffi::DataType::BF16 || type == ffi::DataType::F16;
  return type == ffi::DataType::F32 || (half && holds == Holds::floats);
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

// One call's operands and results, read role after role: each role is a run of `tensors` buffers.
class Roles {
 public:
  Roles(ffi::RemainingArgs& operands, ffi::RemainingRets& results, std::int64_t tensors)
      : operands_(operands), results_(results), tensors_(static_cast<std::size_t>(tensors)) {}

  std::vector<Buffer> operand(bool present = true, Holds holds = Holds::floats) {
    std::vector<Buffer> role(tensors_);
    for (std::size_t i = 0; present && i < tensors_; ++i) {
      const auto buffer = operands_.get<ffi::AnyBuffer>(next_operand_++);
      complete_ = complete_ && buffer.has_value();
      if (buffer.has_value()) role[i] = take(*buffer, holds);
    }
    return role;
  }

  // Written from scratch.
  std::vector<Buffer> result(Holds holds = Holds::floats) {
    const std::vector<Buffer> role = next_results(true, holds);
    for (const Buffer& buffer : role) prefer_huge_pages(buffer);
    return role;
  }
  // An operand that the next result updates in place.
  std::vector<Buffer> updated(bool present = true, Holds holds = Holds::floats) {
    const std::vector<Buffer> before = operand(present, holds), after = next_results(present, holds);
    for (std::size_t i = 0; i < tensors_; ++i) {
      aliased_ = aliased_ && before[i].data == after[i].data && before[i].size == after[i].size;
    }
    return after;
  }

  // The tensors of a role, where it is there, have these sizes.
  template <class Expected>
  void require_sizes(const std::vector<Buffer>& role, Expected expected) {
    for (std::size_t i = 0; i < role.size(); ++i) {
      require(role[i].data == nullptr || role[i].size == expected(i));
    }
  }

  void require_sizes(const std::vector<Buffer>& role, const std::vector<Buffer>& like) {
    require_sizes(role, [&like](std::size_t i) { return like[i].size; });
  }

  void require_codes(const std::vector<Buffer>& codes, const std::vector<Buffer>& scales,
                     const std::vector<Buffer>& values, std::int64_t block, std::int32_t bits) {
    require(block >= 1 && (bits == 4 || bits == 8));
    if (!fits_) return;
    require_sizes(codes, [&](std::size_t i) { return packed_size(values[i].size, bits); });
    require_sizes(scales, [&](std::size_t i) {
      return block_count(values[i].size, std::min(block, std::max<std::int64_t>(values[i].size, 1)));
    });
  }

  void require(bool fits) { fits_ = fits_ && fits; }

  // To be asked before anything is written.
  ffi::Error problem() const {
    if (!fits_) return ffi::Error::InvalidArgument("chainrule: an operand or a result of a wrong size or dtype");
    if (!complete_ || next_operand_ != operands_.size() || next_result_ != results_.size()) {
      return ffi::Error::InvalidArgument("chainrule: wrong number of operands or results");
    }
    if (!aliased_) return ffi::Error::Internal("chainrule: a state operand does not share its result's memory");
    return ffi::Error::Success();
  }

 private:
  std::vector<Buffer> next_results(bool present, Holds holds) {
    std::vector<Buffer> role(tensors_);
    for (std::size_t i = 0; present && i < tensors_; ++i) {
      auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
      complete_ = complete_ && buffer.has_value();
      if (buffer.has_value()) role[i] = take(**buffer, holds);
    }
    return role;
  }

  Buffer take(const ffi::AnyBuffer& buffer, Holds holds) {
    require(holds_of(buffer.element_type(), holds));
    return buffer_of(buffer);
  }

  ffi::RemainingArgs& operands_;
  ffi::RemainingRets& results_;
  std::size_t tensors_, next_operand_ = 0, next_result_ = 0;
  bool complete_ = true, aliased_ = true, fits_ = true;
};

Loop loop_on(ffi::ThreadPool& pool) {
  const int threads = static_cast<int>(std::max<std::int64_t>(pool.num_threads(), 1));
  return [&pool, threads](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
    parallel_for(tasks, threads, [&pool](auto task) { pool.Schedule(std::move(task)); }, body);
  };
}

using Table = ffi::Buffer<ffi::F32, 2>;
using Magnitudes = ffi::Buffer<ffi::F32, 1>;
using Keys = ffi::Buffer<ffi::U32, 2>;

// The columns of the table of a tier-2 step; `layout` hands their names to Python.
struct Tier2Number {
  const char* name;
  double Tier2::*field;
};
constexpr Tier2Number kTier2Numbers[] = {
    {"learning_rate", &Tier2::rate}, {"weight_decay", &Tier2::weight_decay},
    {"b1", &Tier2::b1},              {"b1_long", &Tier2::b1_long},
    {"blend", &Tier2::blend},        {"b2", &Tier2::b2},
    {"eps", &Tier2::eps},            {"mu_correction", &Tier2::mu_correction},
    {"nu_correction", &Tier2::nu_correction},
};
constexpr const char* kTier1Numbers[] = {"learning_rate", "weight_decay", "decay", "mean_magnitude"};

std::vector<Tier2> tier2_tensors(const Table& table, Denominator denominator,
                                 const std::vector<Buffer>& gradients, const std::vector<Buffer>& nu,
                                 const std::vector<Buffer>& parameters, const std::vector<Buffer>& updates) {
  std::vector<Tier2> tensors(gradients.size());
  const float* number = table.typed_data();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Tier2& t = tensors[i];
    t.parameter = parameters[i];
    t.gradient = gradients[i];
    t.output = updates[i];
    t.nu = nu[i];
    t.denominator = denominator;
    for (const Tier2Number& column : kTier2Numbers) t.*column.field = static_cast<double>(*number++);
  }
  return tensors;
}

void require_step(Roles& roles, const Table& table, const std::vector<Buffer>& gradients,
                  const std::vector<const std::vector<Buffer>*>& others) {
  roles.require(table.dimensions()[1] == static_cast<std::int64_t>(std::size(kTier2Numbers)));
  for (const auto* role : others) roles.require_sizes(*role, gradients);
}

// Operands: table, gradients, mu, [mu_long], [nu], [parameters]. Results: updates, mu, [mu_long], [nu].
ffi::Error tier2(ffi::ThreadPool pool, Table table, ffi::RemainingArgs operands, ffi::RemainingRets results,
                 std::string_view denominator_name, bool has_long, bool has_parameters) {
  Roles roles(operands, results, table.dimensions()[0]);
  const int number = index_of(kDenominatorNames, denominator_name);
  roles.require(number >= 0);
  const auto denominator = static_cast<Denominator>(number);
  const bool has_nu = denominator == Denominator::root;
  const auto gradients = roles.operand(), updates = roles.result();
  const auto mu = roles.updated(), mu_long = roles.updated(has_long), nu = roles.updated(has_nu);
  const auto parameters = roles.operand(has_parameters);
  require_step(roles, table, gradients, {&updates, &mu, &mu_long, &nu, &parameters});
  if (const ffi::Error problem = roles.problem(); problem.failure()) return problem;
  auto tensors = tier2_tensors(table, denominator, gradients, nu, parameters, updates);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].mu = mu[i];
    tensors[i].mu_long = mu_long[i];
  }
  run_tier2(tensors, loop_on(pool));
  return ffi::Error::Success();
}

// Codes beside the tensors they belong to; a block beyond the tensor's end is the whole tensor.
Codes codes_of(const Buffer& packed, const Buffer& scales, std::int64_t size, std::int64_t block,
               std::int32_t bits) {
  return {packed, scales, size, std::min(block, std::max<std::int64_t>(size, 1)), bits};
}

// As tier2, with codes and scales in the place of mu and of mu_long.
ffi::Error tier2_quantized(ffi::ThreadPool pool, Table table, ffi::RemainingArgs operands,
                           ffi::RemainingRets results, std::string_view denominator_name, bool has_long,
                           bool has_parameters, std::int64_t block, std::int32_t bits,
                           bool start_at_gradient) {
  Roles roles(operands, results, table.dimensions()[0]);
  const int number = index_of(kDenominatorNames, denominator_name);
  roles.require(number >= 0);
  const auto denominator = static_cast<Denominator>(number);
  const bool has_nu = denominator == Denominator::root;
  const auto gradients = roles.operand(), updates = roles.result();
  const auto codes = roles.updated(true, Holds::bytes), scales = roles.updated(true, Holds::singles);
  const auto long_codes = roles.updated(has_long, Holds::bytes);
  const auto long_scales = roles.updated(has_long, Holds::singles);
  const auto nu = roles.updated(has_nu), parameters = roles.operand(has_parameters);
  require_step(roles, table, gradients, {&updates, &nu, &parameters});
  roles.require_codes(codes, scales, gradients, block, bits);
  roles.require_codes(long_codes, long_scales, gradients, block, bits);
  if (const ffi::Error problem = roles.problem(); problem.failure()) return problem;
  const auto steps = tier2_tensors(table, denominator, gradients, nu, parameters, updates);
  std::vector<Tier2Quantized> tensors(steps.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::int64_t size = gradients[i].size;
    tensors[i] = {steps[i], codes_of(codes[i], scales[i], size, block, bits),
                  codes_of(long_codes[i], long_scales[i], size, block, bits), start_at_gradient};
  }
  run_tier2_quantized(tensors, loop_on(pool));
  return ffi::Error::Success();
}

// Operands: table (`kTier1Numbers`, the mean magnitude -1 where it is not known), magnitudes, gradients, [parameters].
// Results: magnitudes, updates.
ffi::Error tier1(ffi::ThreadPool pool, Table table, Magnitudes old_magnitudes,
                 ffi::RemainingArgs operands, ffi::Result<Magnitudes> magnitudes,
                 ffi::RemainingRets results, bool scale_decay, bool has_parameters) {
  Roles roles(operands, results, table.dimensions()[0]);
  const auto gradients = roles.operand(), updates = roles.result();
  const auto parameters = roles.operand(has_parameters);
  const std::int64_t count = table.dimensions()[0];
  roles.require(table.dimensions()[1] == static_cast<std::int64_t>(std::size(kTier1Numbers)) &&
                old_magnitudes.dimensions()[0] == count && magnitudes->dimensions()[0] == count);
  roles.require_sizes(updates, gradients);
  roles.require_sizes(parameters, gradients);
  if (const ffi::Error problem = roles.problem(); problem.failure()) return problem;
  std::vector<Tier1> tensors(gradients.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const float* numbers = table.typed_data() + 4 * i;
    Tier1& t = tensors[i];
    t.step = {parameters[i], gradients[i], updates[i], static_cast<double>(numbers[0]),
              static_cast<double>(numbers[1])};
    t.magnitude = magnitudes->typed_data() + i;
    *t.magnitude = old_magnitudes.typed_data()[i];
    t.decay = static_cast<double>(numbers[2]);
    t.mean_magnitude = static_cast<double>(numbers[3]);
    t.scale_decay = scale_decay;
  }
  run_tier1(tensors, loop_on(pool));
  return ffi::Error::Success();
}

// All operands of a call that takes nothing else; nothing if one is no tensor of floats.
std::optional<std::vector<Buffer>> floats_of(const ffi::RemainingArgs& operands) {
  std::vector<Buffer> tensors;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const auto buffer = operands.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value() || !holds_of(buffer->element_type(), Holds::floats)) return std::nullopt;
    tensors.push_back(buffer_of(*buffer));
  }
  return tensors;
}

// Operands: gradients. Result: a row of mean |g|, mean g^2, variance and max |g| for each.
ffi::Error statistics(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::Result<Table> table) {
  const auto gradients = floats_of(operands);
  const bool fits = table->dimensions()[0] == static_cast<std::int64_t>(operands.size()) && table->dimensions()[1] == 4;
  if (!gradients || !fits) return ffi::Error::InvalidArgument("chainrule: wrong shape or dtype of statistics");
  float* row = table->typed_data();
  for (const Statistics& s : run_statistics(*gradients, loop_on(pool))) {
    for (const double value : {s.mean_magnitude, s.mean_square, s.variance, s.peak}) {
      *row++ = static_cast<float>(value);
    }
  }
  return ffi::Error::Success();
}

// Operands: c, each x, then each y if the kind is of pairs. Result: (..., tensors, sums), the leading axes those that
// `vmap` gave every operand.
ffi::Error sums(ffi::ThreadPool pool, ffi::AnyBuffer c, ffi::RemainingArgs operands, 
                ffi::Result<ffi::AnyBuffer> result, std::string_view name) {
  const auto misfit = [] { return ffi::Error::InvalidArgument("chainrule: wrong shape or dtype of sums"); };
  const int number = index_of(kSumNames, name);
  if (number < 0) return ffi::Error::InvalidArgument("chainrule: an unknown kind of sums");
  const auto kind = static_cast<SumKind>(number);
  const auto whole = floats_of(operands);
  if (!whole) return misfit();
  const auto axes = result->dimensions();
  const std::size_t tensors = whole->size() / (is_of_pairs(kind) ? 2 : 1);
  const bool fits = c.element_type() == ffi::DataType::F32 &&
                    result->element_type() == ffi::DataType::F32 && axes.size() >= 2 &&
                    axes[axes.size() - 1] == sum_count(kind) &&
                    axes[axes.size() - 2] == static_cast<std::int64_t>(tensors);
  if (!fits) return misfit();
  std::int64_t batch = 1;
  for (std::size_t i = 0; i + 2 < axes.size(); ++i) batch *= axes[i];
  bool same = static_cast<std::int64_t>(c.element_count()) == batch && whole->size() % (is_of_pairs(kind) ? 2 : 1) == 0;
  for (std::size_t i = 0; same && i < whole->size(); ++i) {
    same = (*whole)[i].size == (*whole)[i % std::max<std::size_t>(tensors, 1)].size &&
           (batch == 0 || (*whole)[i].size % batch == 0);
  }
  if (!same) return misfit();
  const auto part = [batch](const Buffer& buffer, std::int64_t index) {
    const std::int64_t size = buffer.size / batch, offset = index * size * element_size(buffer.element);
    return Buffer{static_cast<char*>(buffer.data) + offset, size, buffer.element};
  };
  std::vector<Summands> pairs;
  for (std::int64_t index = 0; index < batch; ++index) {
    for (std::size_t i = 0; i < tensors; ++i) {
      const Buffer y = is_of_pairs(kind) ? part((*whole)[tensors + i], index) : Buffer{};
      pairs.push_back({part((*whole)[i], index), y, static_cast<const float*>(c.untyped_data())[index]});
    }
  }
  float* out = static_cast<float*>(result->untyped_data());
  for (const Sums& found : run_sums(kind, pairs, loop_on(pool))) {
    for (int k = 0; k < sum_count(kind); ++k) *out++ = static_cast<float>(found.of[k]);
  }
  return ffi::Error::Success();
}

// Operands: keys (one (0, 0) a tensor when rounding to nearest), values. Results: codes, scales.
ffi::Error quantize(ffi::ThreadPool pool, Keys keys, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, std::int64_t block, std::int32_t bits, bool stochastic) {
  Roles roles(operands, results, keys.dimensions()[0]);
  const auto values = roles.operand(), codes = roles.result(Holds::bytes), scales = roles.result(Holds::singles);
  roles.require(keys.dimensions()[1] == 2);
  roles.require_codes(codes, scales, values, block, bits);
  if (const ffi::Error problem = roles.problem(); problem.failure()) return problem;
  std::vector<Requantize> tensors(values.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint32_t* key = keys.typed_data() + 2 * i;
    tensors[i] = {values[i], codes_of(codes[i], scales[i], values[i].size, block, bits), stochastic,
                  {key[0], key[1]}};
  }
  run_requantize(tensors, false, loop_on(pool));
  return ffi::Error::Success();
}

// Operands: codes, scales. Results: values.
ffi::Error dequantize(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results,
                      std::int64_t block, std::int32_t bits) {
  Roles roles(operands, results, static_cast<std::int64_t>(results.size()));
  const auto codes = roles.operand(true, Holds::bytes), scales = roles.operand(true, Holds::singles);
  const auto values = roles.result();
  roles.require_codes(codes, scales, values, block, bits);
  if (const ffi::Error problem = roles.problem(); problem.failure()) return problem;
  std::vector<Requantize> tensors(values.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {values[i], codes_of(codes[i], scales[i], values[i].size, block, bits)};
  }
  run_requantize(tensors, true, loop_on(pool));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(tier2_handler, tier2,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Table>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("denominator")
                                  .Attr<bool>("has_long")
                                  .Attr<bool>("has_parameters"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(tier2_quantized_handler, tier2_quantized,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Table>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("denominator")
                                  .Attr<bool>("has_long")
                                  .Attr<bool>("has_parameters")
                                  .Attr<std::int64_t>("block")
                                  .Attr<std::int32_t>("bits")
                                  .Attr<bool>("start_at_gradient"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(tier1_handler, tier1,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Table>()
                                  .Arg<Magnitudes>()
                                  .RemainingArgs()
                                  .Ret<Magnitudes>()
                                  .RemainingRets()
                                  .Attr<bool>("scale_decay")
                                  .Attr<bool>("has_parameters"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    statistics_handler, statistics,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Table>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(sums_handler, sums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(quantize_handler, quantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Keys>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::int64_t>("block")
                                  .Attr<std::int32_t>("bits")
                                  .Attr<bool>("stochastic"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dequantize_handler, dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::int64_t>("block")
                                  .Attr<std::int32_t>("bits"));

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
