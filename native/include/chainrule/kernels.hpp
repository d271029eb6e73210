// The kernels of one instruction set, and the choice among those compiled in.
#pragma once

#include "chainrule/coding.hpp"
#include "chainrule/elements.hpp"
#include "chainrule/quant4.hpp"
#include "chainrule/sums.hpp"
#include "chainrule/tier_update.hpp"

namespace chainrule {

using PartialStatistics = Partial(const Buffer&, std::int64_t begin, std::int64_t end);
using PartialSums = Sums(const Summands&, std::int64_t begin, std::int64_t end);

// Each runs on elements [begin, end) of one tensor.
struct Kernels {
  const char* instruction_set;
  void (*tier2)(const Tier2&, std::int64_t begin, std::int64_t end);
  void (*tier2_quantized)(const Tier2Quantized&, std::int64_t begin, std::int64_t end);
  void (*sign_step)(const SignStep&, std::int64_t begin, std::int64_t end);
  PartialStatistics* statistics;
  PartialSums* sums[kSumKinds];  // by SumKind
  void (*quantize)(const Requantize&, std::int64_t begin, std::int64_t end);
  void (*dequantize)(const Requantize&, std::int64_t begin, std::int64_t end);
  void (*decode_values)(const Coding&, std::int64_t begin, std::int64_t n, float* x);
  void (*encode_values)(const Coding&, std::int64_t begin, std::int64_t n, const float* x);
  const ElementOp* element_ops;  // `kElementOps` of them, the same on every instruction set
  double (*element_sum)(const float* x, std::int64_t n);
};

// All that were compiled and that this processor runs, the widest first; the last is the baseline.
struct KernelChoices {
  const Kernels* kernels[4] = {};
  int count = 0;
};
const KernelChoices& kernel_choices();

// The widest, or what CHAINRULE_ISA names ("baseline", "x86_64_v3", ...).
const Kernels& kernels();

}  // namespace chainrule
