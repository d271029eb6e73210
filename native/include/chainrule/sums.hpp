// Sums over a whole tensor, or two of one shape, that an update must know before it can begin; one pass each.
//
//   magnitude        sum |x| over the finite x
//   moments          sum x,        sum x^2
//   residual         sum |x - y|,  sum (x - y)^2
//   alignment        sum x y,      sum x^2,       sum y^2
//   variance_share   sum x^2 / (x^2 + c y),     0 where both are
//   square_share     sum x^2 / max(x^2, c y),   likewise
//
// A term is float32, so that a square overflows where it would in the arithmetic around it. Terms are added
// in 32 lanes over a tile, the lanes pairwise, and tiles in float64 in a fixed order: the bits do not depend
// on the instruction set or the number of threads.
#pragma once

#include <cstring>
#include <limits>

#include "chainrule/element.hpp"

namespace chainrule {

enum class SumKind : std::uint8_t { moments, residual, alignment, variance_share, square_share, magnitude };
constexpr int kSumKinds = 6;
constexpr const char* kSumNames[kSumKinds] = {"moments",        "residual",     "alignment",
                                              "variance_share", "square_share", "magnitude"};

constexpr int sum_count(SumKind kind) {
  return kind == SumKind::alignment ? 3 : kind == SumKind::moments || kind == SumKind::residual ? 2 : 1;
}

constexpr bool is_of_pairs(SumKind kind) { return kind != SumKind::moments && kind != SumKind::magnitude; }

struct Summands {
  Buffer x;
  Buffer y;     // absent for the sums of one tensor
  float c = 1;  // read for the shares
};

// The sums of a run of at most kSumsRun elements, as many as the kind has.
struct Sums {
  double of[3] = {0, 0, 0};
};
constexpr std::int64_t kSumsRun = 16384;

namespace CHAINRULE_ISA {

template <SumKind kKind>
inline Sums partial_sums(const Summands& t, std::int64_t begin, std::int64_t end) {
  constexpr int kWidth = kRegisterBytes / sizeof(float), kLanes = 32, kVectors = kLanes / kWidth;
  constexpr int kCount = sum_count(kKind);
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef std::int32_t Words __attribute__((vector_size(kWidth * sizeof(std::int32_t))));
  float x_scratch[kTile], y_scratch[kTile];
  Sums total;
  for (std::int64_t tile = begin; tile < end; tile += kTile) {
    const std::int64_t n = end - tile < kTile ? end - tile : kTile;
    const float* x = load(t.x, tile, n, x_scratch);
    const float* y = is_of_pairs(kKind) ? load(t.y, tile, n, y_scratch) : x;
    Floats sums[kCount][kVectors] = {};
    const auto add_lanes = [&](const float* xs, const float* ys) {
      for (int v = 0; v < kVectors; ++v) {
        Floats a, b;
        std::memcpy(&a, xs + v * kWidth, sizeof a);
        std::memcpy(&b, ys + v * kWidth, sizeof b);
        if constexpr (kKind == SumKind::magnitude) {
          const Words size = (Words)a & 0x7fffffff;
          sums[0][v] += (Floats)(size & (size < 0x7f800000));
        } else if constexpr (kKind == SumKind::moments) {
          sums[0][v] += a;
          sums[1][v] += a * a;
        } else if constexpr (kKind == SumKind::residual) {
          const Floats r = a - b;
          sums[0][v] += (Floats)((Words)r & 0x7fffffff);
          sums[1][v] += r * r;
        } else if constexpr (kKind == SumKind::alignment) {
          sums[0][v] += a * b;
          sums[1][v] += a * a;
          sums[2][v] += b * b;
        } else {
          static_assert(kKind == SumKind::variance_share || kKind == SumKind::square_share, "a kind without terms");
          const Floats signal = a * a, other = t.c * b;
          // NaN in either stays: the comparison is false for it, and `other` is then the NaN or divides it.
          const Floats whole =
              kKind == SumKind::variance_share ? signal + other : signal > other ? signal : other;
          sums[0][v] += signal / (whole + std::numeric_limits<float>::min());
        }
      }
    };
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_lanes(x + i, y + i);
    if (i < n) {
      float x_rest[kLanes] = {}, y_rest[kLanes] = {};
      const std::size_t bytes = static_cast<std::size_t>(n - i) * sizeof(float);
      std::memcpy(x_rest, x + i, bytes);
      std::memcpy(y_rest, y + i, bytes);
      add_lanes(x_rest, y_rest);
    }
    for (int k = 0; k < kCount; ++k) {
      float lanes[kLanes];
      std::memcpy(lanes, sums[k], sizeof lanes);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      total.of[k] += static_cast<double>(lanes[0]);
    }
  }
  return total;
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
