// COSMIC's three tiers, and the statistics its tiers and its gate are decided from.
//
//   tier 2   mu = b1 mu + (1 - b1) g,  mu_long = b1_long mu_long + (1 - b1_long) g,
//            nu = b2 nu + (1 - b2) g^2,  m = blend mu + (1 - blend) mu_long,
//            d = (m / c1) / (sqrt(nu / c2) + eps)
//   tier 1   d = c sign(g),  c = decay c + (1 - decay) mean|g|  (c is found by the caller; of the finite g)
//   tier 0   d = sign(g)
//   step     u = -rate wd p - rate d,  then p += u or u is handed out
//
// Source: github Kranium2002/COSMIC at 96f1a8c. Departure: both corrections are the caller's. A gradient
// that is not finite spreads as IEEE arithmetic says. Compiled without contraction to fused multiply-adds,
// so the bits are the same on every instruction set.
#pragma once

#include <cmath>

#include "chainrule/element.hpp"

namespace chainrule {

// What divides the momentum. `magnitude` (|g| + eps) and `none` are the two things the reference does
// when b2 is 0: its fused and its unfused code.
enum class Denominator : std::uint8_t { root, magnitude, none };
constexpr const char* kDenominatorNames[] = {"root", "magnitude", "none"};

// One tensor of a call. Written: mu, nu, mu_long if present, and `output`, or `parameter` without one.
struct Tier2 {
  Buffer parameter;  // absent: weight_decay is not applied
  Buffer gradient;
  Buffer output;  // receives u; may be the gradient's own memory
  Buffer mu;
  Buffer mu_long;  // absent: blend is 1
  Buffer nu;       // absent unless the denominator is the root
  Denominator denominator = Denominator::root;
  double rate = 0, weight_decay = 0;
  double b1 = 0, b1_long = 0, blend = 1, b2 = 0, eps = 0;
  double mu_correction = 1, nu_correction = 1;
};

// Tier 0, and tier 1 once its magnitude c is known.
struct SignStep {
  Buffer parameter;
  Buffer gradient;
  Buffer output;
  double rate = 0, weight_decay = 0, magnitude = 1;
};

// Sums of a run of at most kStatisticsRun elements, in float64.
struct Partial {
  double magnitude = 0, sum = 0, square = 0, peak = 0;
};
constexpr std::int64_t kStatisticsRun = 16384;

struct Statistics {
  double mean_magnitude = 0, mean_square = 0, variance = 0, peak = 0;
};

namespace CHAINRULE_ISA {

struct Tier2Coefficients {
  float b1, b1_rest, b1_long, b1_long_rest, blend, blend_rest, b2, b2_rest, eps, mu_scale, root_scale;

  explicit Tier2Coefficients(const Tier2& t)
      : b1(static_cast<float>(t.b1)),
        b1_rest(static_cast<float>(1 - t.b1)),
        b1_long(static_cast<float>(t.b1_long)),
        b1_long_rest(static_cast<float>(1 - t.b1_long)),
        blend(static_cast<float>(t.blend)),
        blend_rest(static_cast<float>(1 - t.blend)),
        b2(static_cast<float>(t.b2)),
        b2_rest(static_cast<float>(1 - t.b2)),
        eps(static_cast<float>(t.eps)),
        mu_scale(static_cast<float>(1 / t.mu_correction)),
        root_scale(static_cast<float>(1 / std::sqrt(t.nu_correction))) {}
};

inline float magnitude_of(float x) { return from_bits(to_bits(x) & 0x7fffffffu); }

// NaN stays NaN, zero stays zero.
inline float signed_magnitude(float x, float magnitude) {
  return x > 0 ? magnitude : x < 0 ? -magnitude : x;
}

// How far to go at once: a tile, or all the way where nothing is widened and no scratch is needed.
template <class... Buffers>
inline std::int64_t stride(std::int64_t elements, const Buffers&... buffers) {
  const bool direct = (... && (!buffers || buffers.element == Element::float32));
  return direct && elements > kTile ? elements : kTile;
}

// Calls write(i, d) with tier 2's direction d of each of n elements, whose momentum is momentum(i), and updates
// nu on the way. One loop over all memory: it is read faster than in two.
template <class Momentum, class Write>
inline void divide(Denominator denominator, std::int64_t n, Momentum momentum, const float* g, float* nu,
                   const Tier2Coefficients& c, Write write) {
  const float mu_scale = c.mu_scale, eps = c.eps;
  if (denominator == Denominator::root) {
    const float b2 = c.b2, b2_rest = c.b2_rest, root_scale = c.root_scale;
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) {
      const float second = b2 * nu[i] + b2_rest * (g[i] * g[i]);
      nu[i] = second;
      write(i, mu_scale * momentum(i) / (std::sqrt(second) * root_scale + eps));
    }
  } else if (denominator == Denominator::magnitude) {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) write(i, mu_scale * momentum(i) / (magnitude_of(g[i]) + eps));
  } else {
    CHAINRULE_INDEPENDENT
    for (std::int64_t i = 0; i < n; ++i) write(i, mu_scale * momentum(i));
  }
}

// Turns the directions that each(write) produces into the step: the parameter moved, or u handed out.
template <class Step, class Each>
inline void finish(const Step& t, std::int64_t begin, std::int64_t n, Each each) {
  float parameter_scratch[kTile], output_scratch[kTile];
  const float rate = static_cast<float>(t.rate);
  const float decay = static_cast<float>(t.rate * t.weight_decay);
  float* p = t.parameter ? load(t.parameter, begin, n, parameter_scratch) : nullptr;
  if (!t.output) {
    each([=](std::int64_t i, float d) { p[i] = (p[i] - decay * p[i]) - rate * d; });
    store(t.parameter, begin, n, p);
    return;
  }
  float* u = place(t.output, begin, output_scratch);
  if (p != nullptr && decay != 0) {
    each([=](std::int64_t i, float d) { u[i] = -(decay * p[i]) - rate * d; });
  } else {
    each([=](std::int64_t i, float d) { u[i] = -rate * d; });
  }
  store(t.output, begin, n, u);
}

// The part of tier 2 after the momentum, for elements [begin, begin + n).
template <class Momentum>
inline void finish_tier2(const Tier2& t, const Tier2Coefficients& c, std::int64_t begin, std::int64_t n,
                         Momentum momentum, const float* g) {
  float nu_scratch[kTile];
  float* nu = t.nu ? load(t.nu, begin, n, nu_scratch) : nullptr;
  finish(t, begin, n, [&](auto write) { divide(t.denominator, n, momentum, g, nu, c, write); });
  if (nu != nullptr) store(t.nu, begin, n, nu);
}

inline void tier2(const Tier2& t, std::int64_t begin, std::int64_t end) {
  float g_scratch[kTile], mu_scratch[kTile], long_scratch[kTile];
  const Tier2Coefficients c(t);
  const std::int64_t step =
      stride(end - begin, t.parameter, t.gradient, t.output, t.mu, t.mu_long, t.nu);
  for (std::int64_t tile = begin; tile < end; tile += step) {
    const std::int64_t n = end - tile < step ? end - tile : step;
    const float* g = load(t.gradient, tile, n, g_scratch);
    float* mu = load(t.mu, tile, n, mu_scratch);
    const auto new_mu = [=](std::int64_t i) { return mu[i] = c.b1 * mu[i] + c.b1_rest * g[i]; };
    if (t.mu_long) {
      float* mu_long = load(t.mu_long, tile, n, long_scratch);
      const auto momentum = [=](std::int64_t i) {
        mu_long[i] = c.b1_long * mu_long[i] + c.b1_long_rest * g[i];
        return c.blend * new_mu(i) + c.blend_rest * mu_long[i];
      };
      finish_tier2(t, c, tile, n, momentum, g);
      store(t.mu_long, tile, n, mu_long);
    } else {
      finish_tier2(t, c, tile, n, new_mu, g);
    }
    store(t.mu, tile, n, mu);
  }
}

inline void sign_step(const SignStep& t, std::int64_t begin, std::int64_t end) {
  float g_scratch[kTile];
  const float magnitude = static_cast<float>(t.magnitude);
  const std::int64_t step = stride(end - begin, t.parameter, t.gradient, t.output);
  for (std::int64_t tile = begin; tile < end; tile += step) {
    const std::int64_t n = end - tile < step ? end - tile : step;
    const float* g = load(t.gradient, tile, n, g_scratch);
    finish(t, tile, n, [&](auto write) {
      CHAINRULE_INDEPENDENT
      for (std::int64_t i = 0; i < n; ++i) write(i, signed_magnitude(g[i], magnitude));
    });
  }
}

// The largest |x| as bits: without the sign, floats are ordered as integers, NaN above infinity.
inline std::uint32_t peak_bits(const float* x, std::int64_t n) {
  std::int32_t peak = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<std::int32_t>(to_bits(x[i]) & 0x7fffffffu);
    peak = bits > peak ? bits : peak;
  }
  return static_cast<std::uint32_t>(peak);
}

// Sums elements [begin, end), at most kStatisticsRun of them, in eight lanes and a fixed order.
inline Partial partial_statistics(const Buffer& gradient, std::int64_t begin, std::int64_t end) {
  constexpr int kWidth = kRegisterBytes / sizeof(double), kLanes = 8, kVectors = kLanes / kWidth;
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kWidth * sizeof(double))));
  typedef std::int64_t Words __attribute__((vector_size(kWidth * sizeof(std::int64_t))));
  float scratch[kTile];
  Doubles magnitude[kVectors] = {}, sum[kVectors] = {}, square[kVectors] = {};
  std::uint32_t peak = 0;
  const auto add_lanes = [&](const float* g) {
    for (int v = 0; v < kVectors; ++v) {
      Floats x;
      std::memcpy(&x, g + v * kWidth, sizeof x);
      const Doubles wide = __builtin_convertvector(x, Doubles);
      magnitude[v] += (Doubles)((Words)wide & INT64_MAX);
      sum[v] += wide;
      square[v] += wide * wide;
    }
  };
  for (std::int64_t tile = begin; tile < end; tile += kTile) {
    const std::int64_t n = end - tile < kTile ? end - tile : kTile;
    const float* g = load(gradient, tile, n, scratch);
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) add_lanes(g + i);
    if (i < n) {
      float rest[kLanes] = {};
      std::memcpy(rest, g + i, static_cast<std::size_t>(n - i) * sizeof(float));
      add_lanes(rest);
    }
    const std::uint32_t peak_of_tile = peak_bits(g, n);
    peak = peak_of_tile > peak ? peak_of_tile : peak;
  }
  Partial total;
  for (int lane = 0; lane < kLanes; ++lane) {
    total.magnitude += magnitude[lane / kWidth][lane % kWidth];
    total.sum += sum[lane / kWidth][lane % kWidth];
    total.square += square[lane / kWidth][lane % kWidth];
  }
  total.peak = static_cast<double>(from_bits(peak));
  return total;
}

// The statistics of n elements from the partials of their runs, summed in ascending order.
inline Statistics total_statistics(const Partial* partials, std::int64_t runs, std::int64_t n) {
  Partial total;
  for (std::int64_t run = 0; run < runs; ++run) {
    total.magnitude += partials[run].magnitude;
    total.sum += partials[run].sum;
    total.square += partials[run].square;
    if (!(partials[run].peak <= total.peak)) total.peak = partials[run].peak;  // NaN wins, and stays
  }
  Statistics result;
  if (n == 0) return result;
  const double count = static_cast<double>(n);
  const double mean = total.sum / count;
  result.mean_magnitude = total.magnitude / count;
  result.mean_square = total.square / count;
  const double variance = result.mean_square - mean * mean;
  result.variance = variance < 0 ? 0 : variance;
  result.peak = total.peak;
  return result;
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
