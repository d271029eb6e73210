// Many tensors in one parallel loop: large tensors are cut into pieces, small ones packed together.
//
// Pieces are cut at the same elements however many threads there are, and sums are taken piece by piece
// in ascending order, so no result depends on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "chainrule/kernels.hpp"

namespace chainrule {

// Runs body(0) ... body(tasks - 1), claimed in ascending order, and returns when all have ended.
using Loop = std::function<void(std::int64_t tasks, const std::function<void(std::int64_t)>& body)>;

// Elements of a task, by those of the call. The least hides the hand-over; up to the most, longer runs of
// memory are read faster (5 % at 40M elements).
constexpr std::int64_t kLeastGrain = 65536, kMostGrain = 262144;

// What a task's arithmetic does with subnormal float32. An EMA of a parameter that gets no gradient would stay
// subnormal, and slow, for ever: steps flush, as XLA does on its own threads. Codes are exact down to them.
enum class Subnormals { flush, keep };

// Round to nearest and `subnormals`, while it lives: results must not depend on the mode of the thread that
// computes a task.
class FloatMode {
 public:
#if defined(__SSE__)
  explicit FloatMode(Subnormals subnormals) : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ & ~0xe040u) | (subnormals == Subnormals::flush ? 0x8040u : 0));
  }
  ~FloatMode() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  explicit FloatMode(Subnormals subnormals) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    const std::uint64_t flush = subnormals == Subnormals::flush ? std::uint64_t{1} << 24 : 0;
    asm volatile("msr fpcr, %0" ::"r"((saved_ & ~(std::uint64_t{7} << 22)) | flush));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
  explicit FloatMode(Subnormals) {}
#endif
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__SSE__)
  unsigned saved_;
#elif defined(__aarch64__)
  std::uint64_t saved_ = 0;
#endif
};

struct Piece {
  std::size_t tensor;
  std::int64_t begin, end;
  bool first_pass;
};

class Plan {
 public:
  explicit Plan(std::int64_t elements)
      : grain_(std::min(std::max(elements / 64, kLeastGrain), kMostGrain)) {}

  // Cuts a tensor at multiples of `unit`. `passes` 2 lists its pieces twice, unless it is one piece: the
  // second time from the end, whose memory was read last and may still be in the cache.
  void add(std::size_t tensor, std::int64_t size, std::int64_t unit = 1, int passes = 1) {
    const std::int64_t step = unit >= grain_ ? unit : grain_ / unit * unit, pieces = (size + step - 1) / step;
    const bool twice = passes == 2 && pieces > 1;
    for (std::int64_t i = 0; twice && i < pieces; ++i) add_piece(tensor, i * step, size, step, true);
    for (std::int64_t i = 0; i < pieces; ++i) {
      add_piece(tensor, (twice ? pieces - 1 - i : i) * step, size, step, false);
    }
  }

  template <class Body>
  void run(const Loop& loop, Subnormals subnormals, Body body) const {
    const auto tasks = static_cast<std::int64_t>(starts_.size());
    loop(tasks, [&](std::int64_t task) {
      const FloatMode mode(subnormals);
      const auto next = static_cast<std::size_t>(task) + 1;
      const std::size_t stop = next < starts_.size() ? starts_[next] : pieces_.size();
      for (std::size_t i = starts_[next - 1]; i < stop; ++i) body(pieces_[i]);
    });
  }

 private:
  void add_piece(std::size_t tensor, std::int64_t begin, std::int64_t size, std::int64_t step, bool first_pass) {
    const std::int64_t end = std::min(begin + step, size);
    if (open_ == 0) starts_.push_back(pieces_.size());
    pieces_.push_back({tensor, begin, end, first_pass});
    open_ += end - begin;
    if (open_ >= grain_ / 2) open_ = 0;
  }

  std::vector<Piece> pieces_;
  std::vector<std::size_t> starts_;
  std::int64_t grain_, open_ = 0;
};

// `tensors` cut and packed, size(tensor) elements each.
template <class Tensors, class Size, class Unit>
Plan plan_of(const Tensors& tensors, Size size, Unit unit) {
  std::int64_t elements = 0;
  for (const auto& t : tensors) elements += size(t);
  Plan plan(elements);
  for (std::size_t i = 0; i < tensors.size(); ++i) plan.add(i, size(tensors[i]), unit(tensors[i]));
  return plan;
}

inline void run_tier2(const std::vector<Tier2>& tensors, const Loop& loop) {
  const auto size = [](const Tier2& t) { return t.gradient.size; };
  const Plan plan = plan_of(tensors, size, [](const Tier2&) { return 1; });
  const Kernels& k = kernels();
  plan.run(loop, Subnormals::flush,
           [&](const Piece& piece) { k.tier2(tensors[piece.tensor], piece.begin, piece.end); });
}

inline void run_sign(const std::vector<SignStep>& tensors, const Loop& loop) {
  const auto size = [](const SignStep& t) { return t.gradient.size; };
  const Plan plan = plan_of(tensors, size, [](const SignStep&) { return 1; });
  const Kernels& k = kernels();
  plan.run(loop, Subnormals::flush,
           [&](const Piece& piece) { k.sign_step(tensors[piece.tensor], piece.begin, piece.end); });
}

// Two blocks are an even number of elements: no byte of codes is shared between pieces.

inline void run_tier2_quantized(const std::vector<Tier2Quantized>& tensors, const Loop& loop) {
  const auto size = [](const Tier2Quantized& t) { return t.update.gradient.size; };
  const Plan plan = plan_of(tensors, size, [](const Tier2Quantized& t) { return 2 * t.mu.block; });
  const Kernels& k = kernels();
  plan.run(loop, Subnormals::flush,
           [&](const Piece& piece) { k.tier2_quantized(tensors[piece.tensor], piece.begin, piece.end); });
}

inline void run_requantize(const std::vector<Requantize>& tensors, bool decode, const Loop& loop) {
  const auto size = [](const Requantize& t) { return t.values.size; };
  const Plan plan = plan_of(tensors, size, [](const Requantize& t) { return 2 * t.codes.block; });
  const auto kernel = decode ? kernels().dequantize : kernels().quantize;
  plan.run(loop, Subnormals::keep,
           [&](const Piece& piece) { kernel(tensors[piece.tensor], piece.begin, piece.end); });
}

// The partial results of one tensor's runs while they come in, in any order.
template <class Tensor, class Partial, std::int64_t kRun>
class Gathering {
 public:
  Gathering(const Tensor& tensor, std::int64_t size)
      : tensor_(tensor), partials_(static_cast<std::size_t>((size + kRun - 1) / kRun)), missing_(size) {}

  // Adds elements [begin, end), begin a multiple of kRun; true for the call that completes.
  template <class Kernel>
  bool add(Kernel* kernel, std::int64_t begin, std::int64_t end) {
    for (std::int64_t run = begin; run < end; run += kRun) {
      const std::int64_t stop = end - run < kRun ? end : run + kRun;
      partials_[static_cast<std::size_t>(run / kRun)] = kernel(tensor_, run, stop);
    }
    return missing_.fetch_sub(end - begin) == end - begin;
  }

  // In ascending order of the runs.
  const std::vector<Partial>& partials() const { return partials_; }

 private:
  const Tensor tensor_;
  std::vector<Partial> partials_;
  std::atomic<std::int64_t> missing_;
};

inline std::vector<Statistics> run_statistics(const std::vector<Buffer>& gradients, const Loop& loop) {
  const auto size = [](const Buffer& b) { return b.size; };
  const Plan plan = plan_of(gradients, size, [](const Buffer&) { return kStatisticsRun; });
  std::deque<Gathering<Buffer, Partial, kStatisticsRun>> gatherings;
  for (const Buffer& gradient : gradients) gatherings.emplace_back(gradient, gradient.size);
  const Kernels& k = kernels();
  std::vector<Statistics> totals(gradients.size());
  plan.run(loop, Subnormals::flush, [&](const Piece& piece) {
    auto& gathering = gatherings[piece.tensor];
    if (!gathering.add(k.statistics, piece.begin, piece.end)) return;
    const std::vector<Partial>& runs = gathering.partials();
    totals[piece.tensor] = CHAINRULE_ISA::total_statistics(
        runs.data(), static_cast<std::int64_t>(runs.size()), gradients[piece.tensor].size);
  });
  return totals;
}

class SumsGathering : public Gathering<Summands, Sums, kSumsRun> {
 public:
  explicit SumsGathering(const Summands& tensors) : Gathering(tensors, tensors.x.size) {}

  Sums total() const {
    Sums total;
    for (const Sums& run : partials()) {
      for (int k = 0; k < 3; ++k) total.of[k] += run.of[k];
    }
    return total;
  }
};

inline std::vector<Sums> run_sums(SumKind kind, const std::vector<Summands>& tensors, const Loop& loop) {
  const auto size = [](const Summands& t) { return t.x.size; };
  const Plan plan = plan_of(tensors, size, [](const Summands&) { return kSumsRun; });
  std::deque<SumsGathering> gatherings(tensors.begin(), tensors.end());
  PartialSums* const kernel = kernels().sums[static_cast<int>(kind)];
  std::vector<Sums> totals(tensors.size());
  plan.run(loop, Subnormals::flush, [&](const Piece& piece) {
    SumsGathering& gathering = gatherings[piece.tensor];
    if (gathering.add(kernel, piece.begin, piece.end)) totals[piece.tensor] = gathering.total();
  });
  return totals;
}

// Tier 1: the magnitude c, then the step. `mean_magnitude` below 0 is found from the gradient.
struct Tier1 {
  SignStep step;
  float* magnitude = nullptr;
  double decay = 0, mean_magnitude = -1;
  bool scale_decay = false;  // c multiplies the weight decay too, as in the reference

  void update_magnitude(double mean) {
    // Without the old value when its weight is 0: it may be anything on the first step.
    const double old = decay == 0 ? 0 : decay * static_cast<double>(*magnitude);
    *magnitude = static_cast<float>(old + (1 - decay) * mean);
    step.magnitude = static_cast<double>(*magnitude);
    if (scale_decay) step.weight_decay *= step.magnitude;
  }
};

inline void run_tier1(std::vector<Tier1>& tensors, const Loop& loop) {
  struct Progress {
    explicit Progress(const Buffer& gradient) : gathering({gradient, {}}) {}
    SumsGathering gathering;
    std::atomic<bool> ready{false};
  };
  std::int64_t elements = 0;
  for (const Tier1& t : tensors) elements += t.step.gradient.size;
  Plan plan(elements);
  std::deque<Progress> progress;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    Tier1& t = tensors[i];
    progress.emplace_back(t.step.gradient);
    const bool known = t.mean_magnitude >= 0;
    plan.add(i, t.step.gradient.size, kSumsRun, known ? 1 : 2);
    if (known) {
      t.update_magnitude(t.mean_magnitude);
      progress.back().ready.store(true);
    }
  }
  const Kernels& k = kernels();
  PartialSums* const magnitude = k.sums[static_cast<int>(SumKind::magnitude)];
  plan.run(loop, Subnormals::flush, [&](const Piece& piece) {
    Tier1& t = tensors[piece.tensor];
    Progress& now = progress[piece.tensor];
    const bool alone = piece.begin == 0 && piece.end == t.step.gradient.size;
    if ((piece.first_pass || alone) && !now.ready.load(std::memory_order_acquire)) {
      if (now.gathering.add(magnitude, piece.begin, piece.end)) {
        t.update_magnitude(now.gathering.total().of[0] / static_cast<double>(t.step.gradient.size));
        now.ready.store(true, std::memory_order_release);
      }
    }
    if (piece.first_pass) return;
    while (!now.ready.load(std::memory_order_acquire)) std::this_thread::yield();
    k.sign_step(t.step, piece.begin, piece.end);
  });
}

}  // namespace chainrule
