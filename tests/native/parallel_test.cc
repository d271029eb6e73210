// The loop and the pool, and main.
#include <atomic>

#include "check.hpp"

using namespace chainrule;

TEST(every_task_runs_once) {
  for (const int threads : {1, 2, 9}) {
    for (const std::int64_t tasks : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      on_threads(threads)(tasks, [&](std::int64_t task) { ++runs[static_cast<std::size_t>(task)]; });
      for (const auto& count : runs) CHECK(count == 1);
    }
  }
}

TEST(a_loop_ends_on_a_pool_that_never_helps) {
  std::vector<std::function<void()>> kept;
  std::int64_t done = 0;
  parallel_for(100, 4, [&](std::function<void()> task) { kept.push_back(std::move(task)); },
               [&](std::int64_t) { ++done; });
  CHECK(done == 100 && kept.size() == 3);
  for (const auto& late : kept) late();
  CHECK(done == 100);
}

TEST(loops_from_several_threads_share_the_pool) {
  std::atomic<int> done{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) on_threads(3)(20, [&](std::int64_t) { ++done; });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(done == 4 * 50 * 20);
}

int main() {
  for (const Test& test : tests()) {
    test.body();
    std::printf("passed: %s\n", test.name);
  }
  std::printf("%zu tests, instruction set %s\n", tests().size(), kernels().instruction_set);
}
