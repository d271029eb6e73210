// Codes on memory of exactly their size, at block sizes of every kind.
#include "check.hpp"

using namespace chainrule;

namespace {
constexpr std::int64_t kBlocks[] = {1, 2, 3, 16, 101, 513, 1024, 1025, 4096, 100000};
constexpr std::int64_t kSizes[] = {0, 1, 2, 7, 1023, 2051, 140001};

struct Coded {
  std::vector<std::uint8_t> packed;
  std::vector<float> scales;
  Codes codes;

  Coded(std::int64_t n, std::int64_t block, int bits)
      : packed(static_cast<std::size_t>(packed_size(n, bits)), 0xff),
        scales(static_cast<std::size_t>(block_count(n, block))) {
    codes = {{packed.data(), packed_size(n, bits), Element::uint8},
             {scales.data(), block_count(n, block), Element::float32},
             n,
             block,
             bits};
  }
};
}  // namespace

TEST(round_trips_are_within_half_a_quantum) {
  for (const int bits : {4, 8}) {
    for (const std::int64_t block : kBlocks) {
      for (const std::int64_t n : kSizes) {
        for (const bool stochastic : {false, true}) {
          Memory x(draw(n, 5), Element::float32), y(std::vector<float>(static_cast<std::size_t>(n)), Element::float32);
          Coded c(n, block, bits);
          run_requantize({{x.buffer(), c.codes, stochastic, {1, 2}}}, false, on_threads(3));
          run_requantize({{y.buffer(), c.codes}}, true, on_threads(3));
          for (std::int64_t i = 0; i < n; ++i) {
            const double quantum = static_cast<double>(c.scales[static_cast<std::size_t>(i / block)]);
            CHECK(std::fabs(x[i] - y[i]) <= (stochastic ? 1.001 : 0.5001) * quantum);
          }
          if (bits == 4 && n % 2 != 0) CHECK(c.packed.back() >> 4 == 0);
        }
      }
    }
  }
}

TEST(tier2_over_codes_is_a_decode_a_step_and_an_encode) {
  for (const std::int64_t block : kBlocks) {
    for (const std::int64_t n : kSizes) {
      Memory g(draw(n, 6), Element::float32), u(draw(n, 6), Element::float32), plain = u;
      Coded mu(n, block, 4), mu_long(n, block, 8);
      mu_long.codes.bits = 8;
      Memory old(draw(n, 7), Element::float32), long_old(draw(n, 8), Element::float32);
      run_requantize({{old.buffer(), mu.codes}, {long_old.buffer(), mu_long.codes}}, false, on_threads(2));
      run_requantize({{old.buffer(), mu.codes}, {long_old.buffer(), mu_long.codes}}, true, on_threads(2));
      Tier2 t;
      t.denominator = Denominator::none, t.rate = -1, t.b1 = 0.5, t.b1_long = 0.75, t.blend = 0.5;
      t.gradient = g.buffer(), t.output = u.buffer();
      run_tier2_quantized({{t, mu.codes, mu_long.codes}}, on_threads(4));
      t.mu = old.buffer(), t.mu_long = long_old.buffer(), t.output = plain.buffer();
      run_tier2({t}, on_threads(1));
      Coded again(n, block, 4), again_long(n, block, 8);
      run_requantize({{old.buffer(), again.codes}, {long_old.buffer(), again_long.codes}}, false, on_threads(1));
      CHECK(mu.scales == again.scales && mu_long.scales == again_long.scales);
      CHECK(mu_long.packed == again_long.packed);
      for (std::int64_t i = 0; i < n; ++i) {
        CHECK(u[i] == plain[i]);
        const int shift = i % 2 == 0 ? 0 : 4;
        const auto byte = static_cast<std::size_t>(i / 2);
        CHECK(((mu.packed[byte] ^ again.packed[byte]) >> shift & 15) == 0);
      }
    }
  }
}

TEST(values_that_are_not_finite_poison_their_block_alone) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> values(10, 1.0f);
    values[4] = bad;
    Memory x(values, Element::float32), y(values, Element::float32);
    Coded c(10, 3, 4);
    run_requantize({{x.buffer(), c.codes}}, false, on_threads(1));
    run_requantize({{x.buffer(), c.codes, true, {3, 4}}}, false, on_threads(1));
    run_requantize({{y.buffer(), c.codes}}, true, on_threads(1));
    for (std::int64_t i = 0; i < 10; ++i) CHECK(std::isnan(y[i]) == (i / 3 == 1));
  }
}

TEST(logarithmic_codes_are_the_nearest_and_parts_of_whole_blocks_are_the_whole) {
  const std::int64_t key[] = {3, 4};
  for (const int bits : {4, 8}) {
    const double digits = bits == 4 ? 2 : 16, least = bits == 4 ? std::ldexp(1, -7) : std::ldexp(1, -15);
    for (const std::int64_t block : {1, 2, 3, 101, 1025, 100000}) {
      for (const std::int64_t n : kSizes) {
        for (const std::int64_t* random : {static_cast<const std::int64_t*>(nullptr), key}) {
          std::vector<float> x = draw(n, 9), y(x.size()), z(x.size());
          for (float& value : x) value *= value;
          Coded whole(n, block, bits), parts(n, block, bits);
          const Coding coding{whole.codes, true, random}, other{parts.codes, true, random};
          kernels().encode_values(coding, 0, n, x.data());
          kernels().decode_values(coding, 0, n, y.data());
          const std::int64_t unit = 2 * block;
          for (std::int64_t begin = 0; begin < n; begin += unit) {
            const std::int64_t count = std::min(unit, n - begin);
            kernels().encode_values(other, begin, count, x.data() + begin);
            kernels().decode_values(other, begin, count, z.data() + begin);
          }
          CHECK(whole.packed == parts.packed && whole.scales == parts.scales && y == z);
          for (std::size_t i = 0; i < x.size(); ++i) {
            const double scale = static_cast<double>(whole.scales[i / static_cast<std::size_t>(block)]);
            const double ratio = static_cast<double>(x[i]) / scale, found = static_cast<double>(y[i]) / scale;
            if (ratio < least) {
              CHECK(near(found, least));
            } else {
              const double gap = std::exp2(std::floor(std::log2(ratio))) / digits;
              CHECK(std::fabs(ratio - found) <= (random == nullptr ? 0.5001 : 1.001) * gap);
            }
          }
        }
      }
    }
  }
}
