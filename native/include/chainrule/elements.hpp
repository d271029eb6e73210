// Straight-line arithmetic element by element: what an update does to tensors of one length between their statistics.
//
// An operation works on a tile, which stays in the first-level cache, so that a program reads and writes memory once.
// Operations have torch's names and meaning, without fused multiply-adds; add_scaled is add with alpha, finite_or_zero
// is nan_to_num to zeros. A truth value is a mask of 32 bits in a float's place. A program may sum what it computes.
#pragma once

#include <cmath>
#include <cstring>

#include "chainrule/element.hpp"

namespace chainrule {

// Operands are tiles, or numbers, of which every vector of a tile is the same: their step is 0, else 1. Lengths are
// multiples of `kElementLanes`. The result may lie where an operand does.
using ElementLoop = void(float* out, const float* const* in, const std::int64_t* steps, std::int64_t n);
constexpr std::int64_t kElementLanes = 16;

struct ElementOp {
  const char* name;
  int operands;
  ElementLoop* loop;
};
constexpr int kElementOps = 31, kElementOperands = 4;

namespace CHAINRULE_ISA {

constexpr int kElementWidth = kRegisterBytes / sizeof(float);
typedef float ElementFloats __attribute__((vector_size(kElementWidth * sizeof(float))));
typedef std::int32_t ElementWords __attribute__((vector_size(kElementWidth * sizeof(std::int32_t))));

namespace elements {

using F = ElementFloats;
using W = ElementWords;

inline F choose(W mask, F a, F b) { return (F)(((W)a & mask) | ((W)b & ~mask)); }
inline F number(float x) { return x - F{}; }

template <int kOperands, F (*kApply)(const F*)>
void loop(float* out, const float* const* in, const std::int64_t* steps, std::int64_t n) {
  const float* at[kOperands];
  std::int64_t step[kOperands];
  for (int k = 0; k < kOperands; ++k) {
    at[k] = in[k];
    step[k] = steps[k] * kElementWidth;
  }
  for (std::int64_t i = 0; i < n; i += kElementWidth) {
    F x[kOperands];
    for (int k = 0; k < kOperands; ++k) {
      std::memcpy(&x[k], at[k], sizeof x[k]);
      at[k] += step[k];
    }
    const F result = kApply(x);
    std::memcpy(out + i, &result, sizeof result);
  }
}

inline F add(const F* x) { return x[0] + x[1]; }
inline F sub(const F* x) { return x[0] - x[1]; }
inline F mul(const F* x) { return x[0] * x[1]; }
inline F div(const F* x) { return x[0] / x[1]; }
inline F add_scaled(const F* x) { return x[0] + x[2] * x[1]; }
inline F addcmul(const F* x) { return x[0] + x[3] * x[1] * x[2]; }
inline F addcdiv(const F* x) { return x[0] + x[3] * x[1] / x[2]; }
inline F lerp(const F* x) {
  const W near = (W)x[2] & 0x7fffffff;
  const W start = (F)near < number(0.5f);
  return choose(start, x[0], x[1]) + choose(start, x[2], x[2] - number(1)) * (x[1] - x[0]);
}
// NaN in either is the result.
inline F maximum(const F* x) { return choose((x[1] != x[1]) | (x[1] > x[0]), x[1], x[0]); }
inline F minimum(const F* x) { return choose((x[1] != x[1]) | (x[1] < x[0]), x[1], x[0]); }
inline F neg(const F* x) { return (F)((W)x[0] ^ INT32_MIN); }
inline F abs(const F* x) { return (F)((W)x[0] & INT32_MAX); }
inline F square(const F* x) { return x[0] * x[0]; }
inline F reciprocal(const F* x) { return number(1) / x[0]; }
inline F roots(F x) {
  for (int lane = 0; lane < kElementWidth; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}
inline F sqrt(const F* x) { return roots(x[0]); }
inline F rsqrt(const F* x) { return number(1) / roots(x[0]); }
inline F sign(const F* x) {
  const F one = choose(x[0] > F{}, number(1), choose(x[0] < F{}, number(-1), F{}));
  return choose(x[0] != x[0], x[0], one);
}
inline W finite(F x) { return ((W)x & 0x7f800000) != 0x7f800000; }
inline F isfinite(const F* x) { return (F)finite(x[0]); }
inline F finite_or_zero(const F* x) { return (F)((W)x[0] & finite(x[0])); }
inline F clone(const F* x) { return x[0]; }
inline F where(const F* x) { return choose((W)x[0], x[1], x[2]); }
inline F lt(const F* x) { return (F)(x[0] < x[1]); }
inline F le(const F* x) { return (F)(x[0] <= x[1]); }
inline F gt(const F* x) { return (F)(x[0] > x[1]); }
inline F ge(const F* x) { return (F)(x[0] >= x[1]); }
inline F eq(const F* x) { return (F)(x[0] == x[1]); }
inline F ne(const F* x) { return (F)(x[0] != x[1]); }
inline F bitwise_and(const F* x) { return (F)((W)x[0] & (W)x[1]); }
inline F bitwise_or(const F* x) { return (F)((W)x[0] | (W)x[1]); }
inline F bitwise_xor(const F* x) { return (F)((W)x[0] ^ (W)x[1]); }
inline F bitwise_not(const F* x) { return (F) ~(W)x[0]; }

// Adds up `kParts` vectors in float32, and their lanes in double precision.
inline double sum(const float* x, std::int64_t n) {
  constexpr std::int64_t kParts = 4;
  F parts[kParts] = {};
  std::int64_t i = 0;
  for (; i + kParts * kElementWidth <= n; i += kParts * kElementWidth) {
    for (std::int64_t k = 0; k < kParts; ++k) {
      F y;
      std::memcpy(&y, x + i + k * kElementWidth, sizeof y);
      parts[k] += y;
    }
  }
  double total = 0;
  for (const F& part : parts) {
    for (int lane = 0; lane < kElementWidth; ++lane) total += static_cast<double>(part[lane]);
  }
  for (; i < n; ++i) total += static_cast<double>(x[i]);
  return total;
}

}  // namespace elements

#define CHAINRULE_ELEMENT_OP(operands, name) {#name, operands, elements::loop<operands, elements::name>}
constexpr ElementOp kElementTable[kElementOps] = {
    CHAINRULE_ELEMENT_OP(2, add),         CHAINRULE_ELEMENT_OP(2, sub),
    CHAINRULE_ELEMENT_OP(2, mul),         CHAINRULE_ELEMENT_OP(2, div),
    CHAINRULE_ELEMENT_OP(3, add_scaled),  CHAINRULE_ELEMENT_OP(4, addcmul),
    CHAINRULE_ELEMENT_OP(4, addcdiv),     CHAINRULE_ELEMENT_OP(3, lerp),
    CHAINRULE_ELEMENT_OP(2, maximum),     CHAINRULE_ELEMENT_OP(2, minimum),
    CHAINRULE_ELEMENT_OP(1, neg),         CHAINRULE_ELEMENT_OP(1, abs),
    CHAINRULE_ELEMENT_OP(1, square),      CHAINRULE_ELEMENT_OP(1, reciprocal),
    CHAINRULE_ELEMENT_OP(1, sqrt),        CHAINRULE_ELEMENT_OP(1, rsqrt),
    CHAINRULE_ELEMENT_OP(1, sign),        CHAINRULE_ELEMENT_OP(1, isfinite),
    CHAINRULE_ELEMENT_OP(1, finite_or_zero), CHAINRULE_ELEMENT_OP(1, clone),
    CHAINRULE_ELEMENT_OP(3, where),       CHAINRULE_ELEMENT_OP(2, lt),
    CHAINRULE_ELEMENT_OP(2, le),          CHAINRULE_ELEMENT_OP(2, gt),
    CHAINRULE_ELEMENT_OP(2, ge),          CHAINRULE_ELEMENT_OP(2, eq),
    CHAINRULE_ELEMENT_OP(2, ne),          CHAINRULE_ELEMENT_OP(2, bitwise_and),
    CHAINRULE_ELEMENT_OP(2, bitwise_or),  CHAINRULE_ELEMENT_OP(2, bitwise_xor),
    CHAINRULE_ELEMENT_OP(1, bitwise_not)};
#undef CHAINRULE_ELEMENT_OP

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
