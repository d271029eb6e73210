// Elements in memory and in registers: every tile is widened to float32, computed, and narrowed back.
//
// float16 and bfloat16 are converted with integer arithmetic (round to nearest, ties to even; NaN stays
// NaN), so the bits do not depend on the instruction set. Functions live in a namespace named after it,
// because the same source is compiled once for each.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef CHAINRULE_ISA
#define CHAINRULE_ISA baseline
#endif

// Iterations are independent; input and output may be the same element, never overlapping ones.
#if defined(__clang__)
#define CHAINRULE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety) interleave(enable)")
#elif defined(__GNUC__)
#define CHAINRULE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define CHAINRULE_INDEPENDENT
#endif

namespace chainrule {

enum class Element : std::uint8_t { float32, bfloat16, float16, uint8 };

constexpr std::int64_t element_size(Element element) {
  return element == Element::float32 ? 4 : element == Element::uint8 ? 1 : 2;
}

// A contiguous run of elements; data is null when the role is absent.
struct Buffer {
  void* data = nullptr;
  std::int64_t size = 0;
  Element element = Element::float32;

  explicit operator bool() const { return data != nullptr; }
};

// Elements computed at a time: the scratch of five roles stays within the first-level cache.
constexpr std::int64_t kTile = 1024;

namespace CHAINRULE_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen_bfloat16(std::uint16_t half) { return from_bits(std::uint32_t{half} << 16); }

inline std::uint16_t narrow_bfloat16(float value) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

inline float widen_float16(std::uint16_t half) {
  const std::uint32_t sign = (std::uint32_t{half} & 0x8000u) << 16;
  const std::uint32_t rest = (std::uint32_t{half} & 0x7fffu) << 13;
  const std::uint32_t normal = rest + ((127u - 15u) << 23);
  const std::uint32_t special = rest | 0x7f800000u;  // infinity and NaN
  // A subnormal is exact as a difference of normal numbers, which flushing to zero leaves alone.
  const std::uint32_t small = to_bits(from_bits(rest + (113u << 23)) - from_bits(113u << 23));
  const std::uint32_t finite = rest < 0x00800000u ? small : normal;
  return from_bits(sign | (rest >= 0x0f800000u ? special : finite));
}

inline std::uint16_t narrow_float16(float value) {
  const std::uint32_t sign = (to_bits(value) >> 16) & 0x8000u;
  const std::uint32_t rest = to_bits(value) & 0x7fffffffu;
  // Adding one half leaves a subnormal's 10 bits, rounded, at the bottom of the sum.
  const std::uint32_t small = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
  const std::uint32_t normal = (rest - ((127u - 15u) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const std::uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t finite = rest < (113u << 23) ? small : normal;
  return static_cast<std::uint16_t>(sign | (rest >= 0x477ff000u ? special : finite));
}

// float32 values of buffer[begin, begin + n): the memory itself, or the scratch filled from it.
inline float* load(const Buffer& buffer, std::int64_t begin, std::int64_t n, float* scratch) {
  if (buffer.element == Element::float32) return static_cast<float*>(buffer.data) + begin;
  const auto* half = static_cast<const std::uint16_t*>(buffer.data) + begin;
  if (buffer.element == Element::bfloat16) {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) scratch[i] = widen_bfloat16(half[i]);
  } else {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) scratch[i] = widen_float16(half[i]);
  }
  return scratch;
}

// Where results for buffer[begin, ...) are to be computed: the memory itself or the scratch.
inline float* place(const Buffer& buffer, std::int64_t begin, float* scratch) {
  return buffer.element == Element::float32 ? static_cast<float*>(buffer.data) + begin : scratch;
}

// Narrows what `place` or `load` left in the scratch; float32 is already where it belongs.
inline void store(const Buffer& buffer, std::int64_t begin, std::int64_t n, const float* values) {
  if (buffer.element == Element::float32) return;
  auto* half = static_cast<std::uint16_t*>(buffer.data) + begin;
  if (buffer.element == Element::bfloat16) {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) half[i] = narrow_bfloat16(values[i]);
  } else {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) half[i] = narrow_float16(values[i]);
  }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
