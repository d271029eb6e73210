// Compiled once per instruction set, with CHAINRULE_ISA its name.
#include <utility>

#include "chainrule/kernels.hpp"

namespace chainrule {

#define CHAINRULE_TEXT_OF(name) #name
#define CHAINRULE_TEXT(name) CHAINRULE_TEXT_OF(name)

namespace CHAINRULE_ISA {
template <std::size_t... kKind>
constexpr Kernels table_of(std::index_sequence<kKind...>) {
  return {CHAINRULE_TEXT(CHAINRULE_ISA), tier2, tier2_quantized, sign_step, partial_statistics,
          {partial_sums<static_cast<SumKind>(kKind)>...}, quantize, dequantize,
          decode_values, encode_values, kElementTable, elements::sum};
}

extern const Kernels table;
const Kernels table = table_of(std::make_index_sequence<kSumKinds>());
}  // namespace CHAINRULE_ISA
}  // namespace chainrule
