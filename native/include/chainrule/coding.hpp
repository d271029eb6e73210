// Tensors in codes as `quantized_state` holds them: float32 arithmetic that XLA and torch do alike, bit for bit.
//
//   linear        scale = max|x| (1/L) over a block, 1 if that is 0; L = 7 or 127
//                 q = round(x / scale), half to even, or floor(x / scale + u);    x ~ q scale, held as q + L + 1
//   logarithmic   x >= 0; scale = max x (1/T), 0 if that is 0; T = 2 - 2^-m
//                 code c ~ (1 + (c mod 2^m) / 2^m) 2^(floor(c / 2^m) - 2^e + 1) scale, the nearest, upwards in the middle
//                 e, m = 3, 1 or 4, 4; there is no code for 0, but for a block of zeros
//
// A scale below the normal numbers is 0. Layout, random bits and NaN as in quant4.hpp. A logarithmic code is a float's
// exponent and leading digits, so both ways are shifts; random bits are added to the digits that are cut off.
#pragma once

#include "chainrule/quant4.hpp"

namespace chainrule {

struct Coding {
  Codes codes;
  bool logarithmic = false;
  const std::int64_t* key = nullptr;  // two words of 32 bits, to round stochastically

  int digits() const { return codes.bits == 4 ? 1 : 4; }
  std::int32_t highest() const { return (1 << codes.bits) - 1; }
  // What a float's leading digits are above its code.
  std::int32_t offset() const { return (127 - (highest() >> digits())) << digits(); }
  float top() const {
    return logarithmic ? 2.0f - 1.0f / static_cast<float>(1 << digits()) : static_cast<float>(codes.levels());
  }
};

namespace CHAINRULE_ISA {

inline float coded_scale(const Coding& c, std::uint32_t peak) {
  if (peak >= 0x7f800000u) return from_bits(0x7fc00000u);
  const float scale = from_bits(peak) * (1.0f / c.top());
  return scale >= from_bits(0x00800000u) ? scale : c.logarithmic ? 0.0f : 1.0f;
}

inline std::uint8_t linear_code(float ratio, int levels) {
  const auto limit = static_cast<float>(levels);
  ratio = ratio > -limit ? ratio : -limit;  // NaN too
  ratio = ratio < limit ? ratio : limit;
  return static_cast<std::uint8_t>(to_bits(ratio + 12582912.0f) + static_cast<std::uint32_t>(levels + 1));
}

inline std::uint8_t logarithmic_code(float ratio, std::uint32_t more, int cut, std::int32_t offset,
                                     std::int32_t highest) {
  std::int32_t code = (static_cast<std::int32_t>(to_bits(ratio) + more) >> cut) - offset;
  code = code > 0 ? code : 0;
  code = code < highest ? code : highest;
  return static_cast<std::uint8_t>(code);
}

// Quotients by one divisor, of which a processor's own takes as long as ten products. With fused multiply-adds the
// remainder of a product with the inverse is exact, and mends it (Markstein, 1990).
struct Quotient {
  float divisor, inverse;

  explicit Quotient(float scale) : divisor(scale == 0 ? 1.0f : scale), inverse(1.0f / divisor) {}
  // Whether the inverse is a normal number.
  bool is_mended() const { return divisor < from_bits(0x7e000000u); }

  float operator()(float x) const {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const float about = x * inverse;
    return __builtin_fmaf(__builtin_fmaf(-about, divisor, x), inverse, about);
#else
    return x / divisor;
#endif
  }
};

struct Division {
  float divisor;
  float operator()(float x) const { return x / divisor; }
};

template <class Ratio>
inline void code_values_by(Ratio ratio, const Coding& c, const float* x, const std::uint32_t* bits, std::int64_t n,
                           std::uint8_t* codes) {
  const int cut = 23 - c.digits(), levels = c.codes.levels();
  const std::int32_t offset = c.offset(), highest = c.highest();
  if (c.logarithmic && bits == nullptr) {
    const std::uint32_t half = 1u << (cut - 1);
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) codes[i] = logarithmic_code(ratio(x[i]), half, cut, offset, highest);
  } else if (c.logarithmic) {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) {
      codes[i] = logarithmic_code(ratio(x[i]), bits[i] >> (32 - cut), cut, offset, highest);
    }
  } else {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) codes[i] = linear_code(ratio(x[i]), levels);
  }
}

// The codes, one to a byte, of n values in one block; `bits` are random, or null.
inline void code_values(const Coding& c, const float* x, const std::uint32_t* bits, std::int64_t n, float scale,
                        std::uint8_t* codes) {
  const Quotient quotient(scale);
  if (!c.logarithmic && bits != nullptr) {
    round_stochastic(x, bits, n, scale, c.codes.levels(), codes);
  } else if (quotient.is_mended()) {
    code_values_by(quotient, c, x, bits, n, codes);
  } else {
    code_values_by(Division{quotient.divisor}, c, x, bits, n, codes);
  }
}

// Values [begin, begin + n), at x.
inline void decode_values(const Coding& c, std::int64_t begin, std::int64_t n, float* x) {
  if (!c.logarithmic) {
    for (std::int64_t first = 0; first < n; first += kTile) {
      decode(c.codes, begin + first, n - first < kTile ? n - first : kTile, x + first);
    }
    return;
  }
  std::uint8_t room[kTile];
  const auto* scales = static_cast<const float*>(c.codes.scales.data);
  const int cut = 23 - c.digits();
  const std::int32_t offset = c.offset();
  for (std::int64_t tile = 0; tile < n; tile += kTile) {
    const std::int64_t count = n - tile < kTile ? n - tile : kTile;
    const std::uint8_t* codes = unpacked(c.codes, begin + tile, count, room);
    each_block(c.codes, begin + tile, count, [&](std::int64_t block, std::int64_t first, std::int64_t values) {
      const float scale = scales[block];
      CHAINRULE_INDEPENDENT
      for (std::int64_t i = first; i < first + values; ++i) {
        const auto digits = static_cast<std::uint32_t>(codes[i] + offset);
        x[tile + i] = from_bits(digits << cut) * scale;
      }
    });
  }
}

// Codes and scales of values [begin, begin + n), which are whole blocks, from x.
inline void encode_values(const Coding& c, std::int64_t begin, std::int64_t n, const float* x) {
  std::uint8_t room[kTile];
  std::uint32_t bits[kTile], key[2] = {0, 0};
  auto* packed = static_cast<std::uint8_t*>(c.codes.packed.data);
  auto* scales = static_cast<float*>(c.codes.scales.data);
  if (c.key != nullptr) key[0] = static_cast<std::uint32_t>(c.key[0]), key[1] = static_cast<std::uint32_t>(c.key[1]);
  if (c.codes.bits == 4 && begin + n == c.codes.size && c.codes.size % 2 != 0) packed[c.codes.size / 2] = 0;
  std::uint32_t peak = 0;
  float scale = 0;
  const auto walk = [&](std::int64_t first, std::int64_t count, bool large) {
    const float* own = x + (first - begin);
    std::uint8_t* codes = c.codes.bits == 8 ? packed + first : room;
    if (c.key != nullptr) random_bits(key, first, count, bits);
    // All scales first: a processor waits for none of them.
    if (!large) {
      each_block(c.codes, first, count, [&](std::int64_t block, std::int64_t at, std::int64_t values) {
        scales[block] = coded_scale(c, peak_bits(own + at, values));
      });
    }
    each_block(c.codes, first, count, [&](std::int64_t block, std::int64_t at, std::int64_t values) {
      const std::uint32_t* random = c.key == nullptr ? nullptr : bits + at;
      code_values(c, own + at, random, values, large ? scale : scales[block], codes + at);
    });
    if (codes == room) pack(c.codes, first, count, codes);
  };
  each_tile(
      c.codes.block, begin, begin + n,
      [&](std::int64_t first, std::int64_t count) {
        const std::uint32_t found = peak_bits(x + (first - begin), count);
        peak = found > peak ? found : peak;
        scale = coded_scale(c, peak);
      },
      walk,
      [&](std::int64_t block) {
        scales[block] = scale;
        peak = 0;
      });
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
