// Block-quantised state, 4 or 8 bits an element, and tier 2 with its momentum held that way.
//
//   scale = max|x| / L over a block (1 if that is 0), L = 7 or 127
//   q     = clip(round(x / scale), -L, L) + Z, Z = 8 or 128;  x ~ (q - Z) scale
//
// Layout: codes are one stream over the whole tensor, at 4 bits two to a byte, the even index in the low
// nibble; block k covers elements [k block, (k + 1) block), so a block of odd size ends inside a byte. The
// nibble after an odd tensor's end is written 0 by quantize and left alone by tier 2. Even block sizes are
// laid out as the reference does it (its odd ones overwrite each other). To nearest divides in float64, half to even, by the scale before it is stored in float32;
// decoding multiplies by the stored one. Stochastic rounding is floor(x / scale + u) in float32, u from
// the 24 high bits of Threefry-2x32 at the element's index: jax.random.bits(key, shape) gives the same.
// A block with an element that is not finite gets the scale NaN: the whole block decodes to NaN.
#pragma once

#include "chainrule/tier_update.hpp"

namespace chainrule {

struct Codes {
  Buffer packed;  // uint8, packed_size(size, bits)
  Buffer scales;  // float32, one a block
  std::int64_t size = 0, block = 0;
  int bits = 4;

  explicit operator bool() const { return static_cast<bool>(packed); }
  int levels() const { return bits == 4 ? 7 : 127; }
};

constexpr std::int64_t packed_size(std::int64_t size, int bits) {
  return bits == 4 ? (size + 1) / 2 : size;
}
constexpr std::int64_t block_count(std::int64_t size, std::int64_t block) {
  return size / block + (size % block != 0);
}

// Quantises values into codes, or back.
struct Requantize {
  Buffer values;
  Codes codes;
  bool stochastic = false;
  std::uint32_t key[2] = {0, 0};
};

// `update.mu` and `update.mu_long` are absent: the codes stand for them.
struct Tier2Quantized {
  Tier2 update;
  Codes mu, mu_long;
  bool start_at_gradient = false;  // where a scale is 0, the EMA before this step is the gradient
};

namespace CHAINRULE_ISA {

inline std::uint32_t rotate(std::uint32_t x, int by) { return (x << by) | (x >> (32 - by)); }

// 32 random bits for each index in [begin, begin + n).
inline void random_bits(const std::uint32_t key[2], std::int64_t begin, std::int64_t n,
                        std::uint32_t* bits) {
  const std::uint32_t k0 = key[0], k1 = key[1], k2 = key[0] ^ key[1] ^ 0x1bd11bdau;
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) {
    const auto index = static_cast<std::uint64_t>(begin + i);
    std::uint32_t a = static_cast<std::uint32_t>(index >> 32) + k0;
    std::uint32_t b = static_cast<std::uint32_t>(index) + k1;
    const auto four_rounds = [&](int r0, int r1, int r2, int r3, std::uint32_t x, std::uint32_t y) {
      a += b, b = rotate(b, r0) ^ a;
      a += b, b = rotate(b, r1) ^ a;
      a += b, b = rotate(b, r2) ^ a;
      a += b, b = rotate(b, r3) ^ a;
      a += x, b += y;
    };
    four_rounds(13, 15, 26, 6, k1, k2 + 1);
    four_rounds(17, 29, 16, 24, k2, k0 + 2);
    four_rounds(13, 15, 26, 6, k0, k1 + 3);
    four_rounds(17, 29, 16, 24, k1, k2 + 4);
    four_rounds(13, 15, 26, 6, k2, k0 + 5);
    bits[i] = a ^ b;
  }
}

// Codes one to a byte: where they lie, or in `room`.
inline const std::uint8_t* unpacked(const Codes& c, std::int64_t begin, std::int64_t n, std::uint8_t* room) {
  const auto* bytes = static_cast<const std::uint8_t*>(c.packed.data);
  if (c.bits == 8) return bytes + begin;
  std::uint8_t* codes = room;
  if (begin % 2 != 0) {
    *codes++ = bytes[begin / 2] >> 4;
    ++begin;
    --n;
  }
  bytes += begin / 2;
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = bytes[i] & 15;
    codes[2 * i + 1] = bytes[i] >> 4;
  }
  if (n % 2 != 0) codes[n - 1] = bytes[n / 2] & 15;
  return room;
}

inline void pack(const Codes& c, std::int64_t begin, std::int64_t n, const std::uint8_t* codes) {
  auto* bytes = static_cast<std::uint8_t*>(c.packed.data);
  if (c.bits == 8) {
    std::memcpy(bytes + begin, codes, static_cast<std::size_t>(n));
    return;
  }
  if (begin % 2 != 0) {
    bytes[begin / 2] = static_cast<std::uint8_t>((bytes[begin / 2] & 15) | (*codes++ << 4));
    ++begin;
    --n;
  }
  bytes += begin / 2;
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n / 2; ++i) {
    bytes[i] = static_cast<std::uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
  }
  if (n % 2 != 0) {
    bytes[n / 2] = static_cast<std::uint8_t>(codes[n - 1] | (bytes[n / 2] & 0xf0));
  }
}

// The scale of n values in float64.
inline double scale_of(std::uint32_t peak_bits, int levels) {
  if (peak_bits >= 0x7f800000u) return static_cast<double>(from_bits(0x7fc00000u));
  const double scale = static_cast<double>(from_bits(peak_bits)) / levels;
  return static_cast<float>(scale) > 0 ? scale : 1;
}

inline void round_nearest(const float* x, std::int64_t n, double scale, int levels,
                          std::uint8_t* codes) {
  constexpr double kToInteger = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds half to even
  const double limit = levels;
  const int zero = levels + 1;
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) {
    double ratio = static_cast<double>(x[i]) / scale;
    ratio = ratio > -limit ? ratio : -limit;  // NaN too
    ratio = ratio < limit ? ratio : limit;
    const double nearest = (ratio + kToInteger) - kToInteger;
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(nearest) + zero);
  }
}

inline void round_stochastic(const float* x, const std::uint32_t* bits, std::int64_t n, float scale,
                             int levels, std::uint8_t* codes) {
  const float limit = static_cast<float>(levels);
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) {
    float ratio = x[i] / scale + static_cast<float>(bits[i] >> 8) * (1.0f / 16777216.0f);
    ratio = ratio > -limit ? ratio : -limit;
    ratio = ratio < limit ? ratio : limit;
    const auto cut = static_cast<std::int32_t>(ratio);
    const std::int32_t floor = cut - (ratio < static_cast<float>(cut) ? 1 : 0);
    codes[i] = static_cast<std::uint8_t>(floor + levels + 1);
  }
}

// Calls visit(block, first, count) for the part of each block that lies in [begin, begin + n), `first`
// counted from begin.
template <class Visit>
inline void each_block(const Codes& c, std::int64_t begin, std::int64_t n, Visit visit) {
  std::int64_t block = begin / c.block;
  for (std::int64_t first = 0; first < n; ++block) {
    const std::int64_t left = (block + 1) * c.block - begin - first;
    const std::int64_t count = left < n - first ? left : n - first;
    visit(block, first, count);
    first += count;
  }
}

inline void decode(const Codes& c, std::int64_t begin, std::int64_t n, float* x) {
  std::uint8_t room[kTile];
  const auto* scales = static_cast<const float*>(c.scales.data);
  const int zero = c.levels() + 1;
  const std::uint8_t* codes = unpacked(c, begin, n, room);
  each_block(c, begin, n, [&](std::int64_t block, std::int64_t first, std::int64_t count) {
    const float scale = scales[block];
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = first; i < first + count; ++i) {
      x[i] = static_cast<float>(static_cast<int>(codes[i]) - zero) * scale;
    }
  });
}

// Encodes n values at `begin`. With `scale` 0 the run is whole blocks, whose scales are found and
// stored; otherwise it is part of one block with that scale, which the caller stores.
inline void encode(const Codes& c, std::int64_t begin, std::int64_t n, const float* x, double scale,
                   const std::uint32_t* key) {
  std::uint8_t codes[kTile];
  std::uint32_t bits[kTile];
  auto* scales = static_cast<float*>(c.scales.data);
  if (key != nullptr) random_bits(key, begin, n, bits);
  each_block(c, begin, n, [&](std::int64_t block, std::int64_t first, std::int64_t count) {
    double used = scale;
    if (scale == 0) {
      used = scale_of(peak_bits(x + first, count), c.levels());
      scales[block] = static_cast<float>(used);
    }
    if (key != nullptr) {
      const auto single = static_cast<float>(used);
      round_stochastic(x + first, bits + first, count, single, c.levels(), codes + first);
    } else {
      round_nearest(x + first, count, used, c.levels(), codes + first);
    }
  });
  pack(c, begin, n, codes);
}

// Walks [begin, end), which starts at a block, in tiles of whole blocks: tile(first, n, false). A block
// larger than a tile is walked twice, peak(first, n) and then tile(first, n, true), and closed by
// close(block).
template <class Peak, class Tile, class Close>
inline void each_tile(std::int64_t block, std::int64_t begin, std::int64_t end, Peak peak, Tile tile,
                      Close close) {
  const bool large = block > kTile;
  const std::int64_t step = large ? block : kTile / block * block;
  for (std::int64_t span = begin; span < end; span += step) {
    const std::int64_t stop = end - span < step ? end : span + step;
    const auto walk = [&](auto visit) {
      for (std::int64_t first = span; first < stop; first += kTile) {
        visit(first, stop - first < kTile ? stop - first : kTile);
      }
    };
    if (large) walk(peak);
    walk([&](std::int64_t first, std::int64_t n) { tile(first, n, large); });
    if (large) close(span / block);
  }
}

// The scale of a block larger than a tile, gathered tile by tile.
struct WholeScale {
  std::uint32_t peak = 0;

  void add(const float* x, std::int64_t n) {
    const std::uint32_t bits = peak_bits(x, n);
    peak = bits > peak ? bits : peak;
  }
  void close(const Codes& c, std::int64_t block) {
    static_cast<float*>(c.scales.data)[block] = static_cast<float>(scale_of(peak, c.levels()));
    peak = 0;
  }
};

inline void quantize(const Requantize& t, std::int64_t begin, std::int64_t end) {
  float scratch[kTile];
  WholeScale whole;
  const std::uint32_t* key = t.stochastic ? t.key : nullptr;
  if (t.codes.bits == 4 && end == t.codes.size && end % 2 != 0) {
    static_cast<std::uint8_t*>(t.codes.packed.data)[end / 2] = 0;
  }
  each_tile(
      t.codes.block, begin, end,
      [&](std::int64_t first, std::int64_t n) { whole.add(load(t.values, first, n, scratch), n); },
      [&](std::int64_t first, std::int64_t n, bool large) {
        const double scale = large ? scale_of(whole.peak, t.codes.levels()) : 0;
        encode(t.codes, first, n, load(t.values, first, n, scratch), scale, key);
      },
      [&](std::int64_t block) { whole.close(t.codes, block); });
}

inline void dequantize(const Requantize& t, std::int64_t begin, std::int64_t end) {
  float scratch[kTile];
  for (std::int64_t tile = begin; tile < end; tile += kTile) {
    const std::int64_t n = end - tile < kTile ? end - tile : kTile;
    float* values = place(t.values, tile, scratch);
    decode(t.codes, tile, n, values);
    store(t.values, tile, n, values);
  }
}

// The new EMA of n elements, from the codes as they are.
inline void coded_ema(const Codes& c, bool start_at_gradient, std::int64_t begin, std::int64_t n,
                      const float* g, float decay, float rest, float* ema) {
  const auto* scales = static_cast<const float*>(c.scales.data);
  decode(c, begin, n, ema);
  each_block(c, begin, n, [&](std::int64_t block, std::int64_t first, std::int64_t count) {
    if (!start_at_gradient || scales[block] != 0) return;
    std::memcpy(ema + first, g + first, static_cast<std::size_t>(count) * sizeof(float));
  });
  CHAINRULE_INDEPENDENT
  for (std::int64_t i = 0; i < n; ++i) ema[i] = decay * ema[i] + rest * g[i];
}

inline void tier2_quantized(const Tier2Quantized& q, std::int64_t begin, std::int64_t end) {
  float g_scratch[kTile], mu[kTile], mu_long[kTile];
  const Tier2& t = q.update;
  const Tier2Coefficients c(t);
  WholeScale whole, whole_long;
  const auto new_mu = [&](std::int64_t first, std::int64_t n, const float* g) {
    coded_ema(q.mu, q.start_at_gradient, first, n, g, c.b1, c.b1_rest, mu);
  };
  const auto new_mu_long = [&](std::int64_t first, std::int64_t n, const float* g) {
    coded_ema(q.mu_long, q.start_at_gradient, first, n, g, c.b1_long, c.b1_long_rest, mu_long);
  };
  each_tile(
      q.mu.block, begin, end,
      [&](std::int64_t first, std::int64_t n) {
        const float* g = load(t.gradient, first, n, g_scratch);
        new_mu(first, n, g);
        whole.add(mu, n);
        if (q.mu_long) {
          new_mu_long(first, n, g);
          whole_long.add(mu_long, n);
        }
      },
      [&](std::int64_t first, std::int64_t n, bool large) {
        const float* g = load(t.gradient, first, n, g_scratch);
        new_mu(first, n, g);
        encode(q.mu, first, n, mu, large ? scale_of(whole.peak, q.mu.levels()) : 0, nullptr);
        if (q.mu_long) {
          new_mu_long(first, n, g);
          const double scale = large ? scale_of(whole_long.peak, q.mu_long.levels()) : 0;
          encode(q.mu_long, first, n, mu_long, scale, nullptr);
          const auto blended = [&](std::int64_t i) { return c.blend * mu[i] + c.blend_rest * mu_long[i]; };
          finish_tier2(t, c, first, n, blended, g);
        } else {
          finish_tier2(t, c, first, n, [&](std::int64_t i) { return mu[i]; }, g);
        }
      },
      [&](std::int64_t block) {
        whole.close(q.mu, block);
        if (q.mu_long) whole_long.close(q.mu_long, block);
      });
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
