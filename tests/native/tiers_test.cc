// Every tier on memory of exactly its size, over dtypes and sizes around a vector, a tile and a task.
#include "check.hpp"

using namespace chainrule;

namespace {
constexpr Element kElements[] = {Element::float32, Element::bfloat16, Element::float16};
constexpr std::int64_t kSizes[] = {0, 1, 3, 17, 1023, 1024, 1025, 65536, 70001};

double tolerance(Element element) { return element == Element::float32 ? 1e-5 : 8e-3; }

Tier2 settings() {
  Tier2 t;
  t.rate = 0.1;
  t.weight_decay = 0.2;
  t.b1 = 0.9;
  t.b2 = 0.99;
  t.eps = 1e-3;
  t.nu_correction = 0.5;
  return t;
}
}  // namespace

TEST(tier2_in_place) {
  for (const Element element : kElements) {
    for (const std::int64_t n : kSizes) {
      Memory p(draw(n, 1), element), g(draw(n, 2), element), mu(draw(n, 3), element), nu(draw(n, 4), Element::float32);
      const Memory p0 = p, mu0 = mu;
      Tier2 t = settings();
      std::vector<float> squares = draw(n, 4);
      for (float& x : squares) x *= x;
      nu = Memory(squares, Element::float32);
      const Memory nu0 = nu;
      t.parameter = p.buffer(), t.gradient = g.buffer(), t.mu = mu.buffer(), t.nu = nu.buffer();
      run_tier2({t}, on_threads(3));
      for (std::int64_t i = 0; i < n; ++i) {
        const double m = 0.9 * mu0[i] + 0.1 * g[i], v = 0.99 * nu0[i] + 0.01 * g[i] * g[i];
        const double moved = p0[i] - 0.1 * (0.2 * p0[i] + m / (std::sqrt(v / 0.5) + 1e-3));
        CHECK(near(mu[i], m, tolerance(element)));
        CHECK(near(nu[i], v));
        CHECK(near(p[i], moved, tolerance(element)));
      }
    }
  }
}

TEST(tier2_hands_out_a_blend_in_the_gradients_memory) {
  for (const Element element : kElements) {
    for (const std::int64_t n : kSizes) {
      Memory g(draw(n, 2), element), mu(draw(n, 3), Element::float32), mu_long(draw(n, 4), Element::bfloat16);
      const Memory g0 = g, mu0 = mu, long0 = mu_long;
      Tier2 t = settings();
      t.rate = -1, t.weight_decay = 0, t.b1_long = 0.5, t.blend = 0.25, t.denominator = Denominator::magnitude;
      t.gradient = g.buffer(), t.output = g.buffer(), t.mu = mu.buffer(), t.mu_long = mu_long.buffer();
      run_tier2({t}, on_threads(2));
      for (std::int64_t i = 0; i < n; ++i) {
        const double m = 0.9 * mu0[i] + 0.1 * g0[i], slow = 0.5 * long0[i] + 0.5 * g0[i];
        CHECK(near(g[i], (0.25 * m + 0.75 * slow) / (std::fabs(g0[i]) + 1e-3), tolerance(element)));
      }
    }
  }
}

TEST(tier1_and_tier0) {
  for (const Element element : kElements) {
    for (const std::int64_t n : kSizes) {
      Memory p(draw(n, 1), element), g(draw(n, 2), element);
      const Memory p0 = p;
      double mean = 0;
      for (std::int64_t i = 0; i < n; ++i) mean += std::fabs(g[i]) / static_cast<double>(n);
      float magnitude = 0.5f;
      std::vector<Tier1> tensors(1);
      tensors[0].step = {p.buffer(), g.buffer(), {}, 0.1, 0.2};
      tensors[0].magnitude = &magnitude;
      tensors[0].decay = 0.75;
      run_tier1(tensors, on_threads(4));
      const double c = n == 0 ? 0.5 : 0.75 * 0.5 + 0.25 * mean;
      CHECK(near(static_cast<double>(magnitude), c));
      for (std::int64_t i = 0; i < n; ++i) {
        const double sign = (g[i] > 0) - (g[i] < 0);
        CHECK(near(p[i], p0[i] - 0.1 * (0.2 * p0[i] + c * sign), tolerance(element)));
      }
      const Memory p1 = p;
      run_sign({{p.buffer(), g.buffer(), {}, 0.1, 0.0}}, on_threads(1));
      for (std::int64_t i = 0; i < n; ++i) {
        CHECK(near(p[i], p1[i] - 0.1 * ((g[i] > 0) - (g[i] < 0)), tolerance(element)));
      }
    }
  }
}

TEST(statistics_do_not_depend_on_threads) {
  std::vector<Memory> memory;
  std::vector<Buffer> gradients;
  memory.reserve(std::size(kSizes));
  for (const std::int64_t n : kSizes) gradients.push_back(memory.emplace_back(draw(n, 9), Element::float32).buffer());
  const auto alone = run_statistics(gradients, on_threads(1)), together = run_statistics(gradients, on_threads(8));
  for (std::size_t i = 0; i < alone.size(); ++i) {
    CHECK(std::memcmp(&alone[i], &together[i], sizeof(Statistics)) == 0);
    double mean = 0, peak = 0;
    const double n = static_cast<double>(gradients[i].size);
    for (std::int64_t k = 0; k < gradients[i].size; ++k) {
      mean += std::fabs(memory[i][k]) / n;
      peak = std::fmax(peak, std::fabs(memory[i][k]));
    }
    CHECK(near(alone[i].mean_magnitude, mean, 1e-9));
    CHECK(alone[i].peak == peak);
  }
}

TEST(all_instruction_sets_give_the_same_bits) {
  const KernelChoices& choices = kernel_choices();
  std::vector<float> expected;
  for (int k = 0; k < choices.count; ++k) {
    Memory p(draw(3001, 1), Element::float32), g(draw(3001, 2), Element::float16);
    Memory mu(draw(3001, 3), Element::bfloat16), nu(std::vector<float>(3001, 0.25f), Element::float32);
    Tier2 t = settings();
    t.parameter = p.buffer(), t.gradient = g.buffer(), t.mu = mu.buffer(), t.nu = nu.buffer();
    choices.kernels[k]->tier2(t, 0, 3001);
    std::vector<float> moved(3001);
    std::memcpy(moved.data(), p.buffer().data, 3001 * sizeof(float));
    if (k == 0) expected = moved;
    CHECK(moved == expected);
  }
}
