// What the doors check, and how they say it: which argument, what it must be, what it was, what helps.
//
// Nothing here knows Python or XLA. A door reads its arguments into roles, and turns what is thrown into the errors of
// its side; only after the last check is anything written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "chainrule/batch.hpp"

namespace chainrule {

// An argument of another type; whatever else is refused is a std::invalid_argument and no more.
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class Error = std::invalid_argument>
[[noreturn]] void refuse(const std::string& where, const std::string& bound, const std::string& got,
                         const std::string& remedy = "") {
  throw Error(where + ": must be " + bound + ", got " + got + (remedy.empty() ? "" : "; " + remedy));
}

inline std::string at(const std::string& name, std::size_t index) { return name + "[" + std::to_string(index) + "]"; }

// With as few digits as tell it from every other number.
inline std::string shown(double x) {
  char text[32];
  for (int digits = 6; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, x);
    if (std::strtod(text, nullptr) == x) break;
  }
  return text;
}

// x, if it is in [low, high].
template <class Number>
Number in_range(const std::string& where, Number x, Number low, Number high) {
  if (x >= low && x <= high) return x;
  refuse(where, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]", std::to_string(x));
}

// The position of a name in a table of names.
template <std::size_t kCount>
int index_of(const char* const (&names)[kCount], std::string_view name, const char* where) {
  std::string known;
  for (std::size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    known += (i > 0 ? ", " : "") + std::string(names[i]);
  }
  refuse(where, "one of " + known, "'" + std::string(name) + "'");
}

inline Denominator denominator_of(std::string_view name) {
  return static_cast<Denominator>(index_of(kDenominatorNames, name, "denominator"));
}

inline SumKind sum_kind_of(std::string_view name) { return static_cast<SumKind>(index_of(kSumNames, name, "kind")); }

// ---- tensors ------------------------------------------------------------------------------

constexpr const char* kElementNames[] = {"float32", "bfloat16", "float16", "uint8"};

inline Element element_of(std::string_view dtype, const std::string& where) {
  for (std::size_t i = 0; i < std::size(kElementNames); ++i) {
    if (dtype == kElementNames[i]) return static_cast<Element>(i);
  }
  refuse<WrongType>(where, "float32, bfloat16, float16 or (for codes) uint8", std::string(dtype),
                    "cast it, or use the XLA form of the chain");
}

// What the tensors of a role hold.
enum class Holds { floats, singles, codes };

inline void require_holds(Holds holds, Element element, const char* name, std::size_t index) {
  const bool fits = holds == Holds::codes     ? element == Element::uint8
                    : holds == Holds::singles ? element == Element::float32
                                              : element != Element::uint8;
  constexpr const char* kBounds[] = {"float32, bfloat16 or float16", "float32", "uint8"};
  if (!fits) {
    refuse<WrongType>(at(name, index), kBounds[static_cast<int>(holds)], kElementNames[static_cast<int>(element)]);
  }
}

// An argument of one tensor for each that a call is about; one that is absent has absent buffers.
struct Role {
  const char* name = "";
  const std::vector<Buffer>* buffers = nullptr;

  explicit operator bool() const { return buffers != nullptr; }
  std::size_t size() const { return buffers == nullptr ? 0 : buffers->size(); }
  Buffer operator[](std::size_t i) const { return buffers == nullptr ? Buffer{} : (*buffers)[i]; }
};

// Every tensor of the role has the length that `expected(i)` gives.
template <class Expected>
void require_sizes(const Role& role, Expected expected) {
  for (std::size_t i = 0; i < role.size(); ++i) {
    const std::int64_t size = role[i].size, wanted = expected(i);
    if (size != wanted) refuse(at(role.name, i), "of " + std::to_string(wanted) + " elements", std::to_string(size));
  }
}

inline void require_like(const Role& role, const Role& like) {
  require_sizes(role, [&](std::size_t i) { return like[i].size; });
}

// ---- calls --------------------------------------------------------------------------------

// The roles that every step has: what is read, and where the step goes.
struct StepRoles {
  Role gradients, updates, parameters;

  void require() const {
    require_like(updates, gradients);
    require_like(parameters, gradients);
  }

  template <class Step>
  void fill(Step& step, std::size_t i, double rate, double weight_decay) const {
    step.parameter = parameters[i];
    step.gradient = gradients[i];
    step.output = updates[i];
    step.rate = rate;
    step.weight_decay = weight_decay;
  }
};

// The numbers of a tier-2 step in the order of its table, with their ranges; `layout` hands the names to Python.
struct Tier2Number {
  const char* name;
  double Tier2::*field;
  double low, high;
  bool low_excluded = false;
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Tier2Number kTier2Numbers[] = {
    {"learning_rate", &Tier2::rate, -kInfinity, kInfinity},
    {"weight_decay", &Tier2::weight_decay, -kInfinity, kInfinity},
    {"b1", &Tier2::b1, 0, 1},
    {"b1_long", &Tier2::b1_long, 0, 1},
    {"blend", &Tier2::blend, 0, 1},
    {"b2", &Tier2::b2, 0, 1},
    {"eps", &Tier2::eps, 0, kInfinity},
    {"mu_correction", &Tier2::mu_correction, 0, kInfinity, true},
    {"nu_correction", &Tier2::nu_correction, 0, kInfinity, true},
};

// The tensors of a tier-2 step; `number(k, i)` is the k-th of `kTier2Numbers` for the i-th tensor. Moments that are
// codes are absent here.
template <class Number>
std::vector<Tier2> tier2_of(const StepRoles& roles, const Role& mu, const Role& mu_long, const Role& nu,
                            Denominator denominator, Number number) {
  if (static_cast<bool>(nu) != (denominator == Denominator::root)) {
    refuse("nu", nu ? "None" : "given", nu ? "it" : "None",
           "denominator is '" + std::string(kDenominatorNames[static_cast<int>(denominator)]) + "'");
  }
  roles.require();
  for (const Role* role : {&mu, &mu_long, &nu}) require_like(*role, roles.gradients);
  std::vector<Tier2> tensors(roles.gradients.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Tier2& t = tensors[i];
    roles.fill(t, i, 0, 0);
    t.mu = mu[i];
    t.mu_long = mu_long[i];
    t.nu = nu[i];
    t.denominator = denominator;
    for (std::size_t k = 0; k < std::size(kTier2Numbers); ++k) t.*kTier2Numbers[k].field = number(k, i);
  }
  return tensors;
}

// Codes and scales of tensors with the sizes of `values`, in blocks of `block(i)`; one beyond a tensor's end is the
// whole tensor.
template <class Block>
std::vector<Codes> codes_of(const Role& packed, const Role& scales, const Role& values, Block block, int bits) {
  if (bits != 4 && bits != 8) refuse("bits", "4 or 8", std::to_string(bits));
  std::vector<Codes> codes(values.size());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const std::int64_t size = values[i].size, wanted = block(i);
    if (wanted < 1) refuse("block", "at least 1", std::to_string(wanted));
    codes[i] = {packed[i], scales[i], size, std::min(wanted, std::max<std::int64_t>(size, 1)), bits};
  }
  require_sizes(packed, [&](std::size_t i) { return packed_size(values[i].size, bits); });
  require_sizes(scales, [&](std::size_t i) { return block_count(values[i].size, codes[i].block); });
  return codes;
}

}  // namespace chainrule
