// Chooses the kernels at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "chainrule/kernels.hpp"

namespace chainrule {

namespace baseline {
extern const Kernels table;
}
#if defined(CHAINRULE_HAS_X86_64_V3)
namespace x86_64_v3 {
extern const Kernels table;
}
#endif
#if defined(CHAINRULE_HAS_X86_64_V4)
namespace x86_64_v4 {
extern const Kernels table;
}
#endif

const KernelChoices& kernel_choices() {
  static const KernelChoices choices = [] {
    KernelChoices found;
#if defined(CHAINRULE_HAS_X86_64_V4)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.kernels[found.count++] = &x86_64_v4::table;
    }
#endif
#if defined(CHAINRULE_HAS_X86_64_V3)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("fma")) {
      found.kernels[found.count++] = &x86_64_v3::table;
    }
#endif
    found.kernels[found.count++] = &baseline::table;
    return found;
  }();
  return choices;
}

const Kernels& kernels() {
  const KernelChoices& choices = kernel_choices();
  const char* wanted = std::getenv("CHAINRULE_ISA");
  if (wanted == nullptr) return *choices.kernels[0];
  std::string known;
  for (int i = 0; i < choices.count; ++i) {
    if (std::strcmp(choices.kernels[i]->instruction_set, wanted) == 0) return *choices.kernels[i];
    known += std::string(i > 0 ? ", " : "") + choices.kernels[i]->instruction_set;
  }
  throw std::invalid_argument("CHAINRULE_ISA must be one of " + known + " on this processor, got '" +
                              wanted + "'");
}

}  // namespace chainrule
