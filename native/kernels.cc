// Compiled once per instruction set, with CHAINRULE_ISA its name.
#include "chainrule/kernels.hpp"

namespace chainrule {

#define CHAINRULE_TEXT_OF(name) #name
#define CHAINRULE_TEXT(name) CHAINRULE_TEXT_OF(name)

namespace CHAINRULE_ISA {
extern const Kernels table;
const Kernels table = {
    CHAINRULE_TEXT(CHAINRULE_ISA), tier2,    tier2_quantized, sign_step, partial_statistics,
    {partial_sums<SumKind::moments>, partial_sums<SumKind::residual>, partial_sums<SumKind::alignment>,
     partial_sums<SumKind::variance_share>, partial_sums<SumKind::square_share>,
     partial_sums<SumKind::magnitude>},
    quantize, dequantize,
};
}  // namespace CHAINRULE_ISA
}  // namespace chainrule
