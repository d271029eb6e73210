// Sums over tensors, on any number of threads and any instruction set.
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "check.hpp"

using namespace chainrule;

namespace {
constexpr Element kElements[] = {Element::float32, Element::bfloat16, Element::float16};
constexpr std::int64_t kSizes[] = {0, 1, 31, 33, 1024, 1025, 16384, 70001};
}  // namespace

TEST(sums_follow_their_formulas_on_any_number_of_threads) {
  for (const Element element : kElements) {
    std::vector<Memory> memory;
    std::vector<Summands> pairs;
    memory.reserve(2 * std::size(kSizes));
    for (const std::int64_t n : kSizes) {
      const Buffer x = memory.emplace_back(draw(n, 3), element).buffer();
      std::vector<float> second = draw(n, 4);
      for (float& y : second) y = y * y;
      pairs.push_back({x, memory.emplace_back(second, Element::float32).buffer(), 0.5f});
    }
    for (int number = 0; number < kSumKinds; ++number) {
      const auto kind = static_cast<SumKind>(number);
      const auto alone = run_sums(kind, pairs, on_threads(1)), together = run_sums(kind, pairs, on_threads(8));
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        CHECK(std::memcmp(&alone[i], &together[i], sizeof(Sums)) == 0);
        double expected[3] = {0, 0, 0};
        const Memory &xs = memory[2 * i], &ys = memory[2 * i + 1];
        for (std::int64_t k = 0; k < pairs[i].x.size; ++k) {
          const double x = xs[k], y = ys[k], square = x * x;
          switch (kind) {
            case SumKind::magnitude: expected[0] += std::fabs(x); break;
            case SumKind::moments: expected[0] += x, expected[1] += square; break;
            case SumKind::residual: expected[0] += std::fabs(x - y), expected[1] += (x - y) * (x - y); break;
            case SumKind::alignment: expected[0] += x * y, expected[1] += square, expected[2] += y * y; break;
            case SumKind::variance_share: expected[0] += square / (square + 0.5 * y); break;
            case SumKind::square_share: expected[0] += square / std::fmax(square, 0.5 * y); break;
          }
        }
        for (int k = 0; k < sum_count(kind); ++k) CHECK(near(alone[i].of[k], expected[k]));
      }
    }
  }
}

TEST(the_magnitude_leaves_out_what_is_not_finite) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> values(70, -0.5f);
  values[0] = nan, values[33] = -inf, values[69] = inf;
  Memory x(values, Element::float32);
  const KernelChoices& choices = kernel_choices();
  for (int k = 0; k < choices.count; ++k) {
    const auto magnitude = choices.kernels[k]->sums[static_cast<int>(SumKind::magnitude)];
    CHECK(magnitude({x.buffer(), {}}, 0, 70).of[0] == 33.5);
  }
}

TEST(all_instruction_sets_give_the_same_sums) {
  const KernelChoices& choices = kernel_choices();
  Memory x(draw(3001, 1), Element::float32), y(draw(3001, 2), Element::bfloat16);
  for (int number = 0; number < kSumKinds; ++number) {
    const Sums expected = choices.kernels[0]->sums[number]({x.buffer(), y.buffer(), 2.0f}, 0, 3001);
    for (int k = 1; k < choices.count; ++k) {
      const Sums found = choices.kernels[k]->sums[number]({x.buffer(), y.buffer(), 2.0f}, 0, 3001);
      CHECK(std::memcmp(&expected, &found, sizeof(Sums)) == 0);
    }
  }
}
