// A parallel loop over numbered tasks, on any pool that can schedule a function, and a small pool.
//
// The caller works too and waits only for tasks that somebody has begun, so a loop ends even when the
// pool never gets to its helpers (all busy, or waiting themselves). Tasks are claimed in ascending order:
// a task may wait for an earlier one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace chainrule {

// Runs body(0) ... body(tasks - 1) on the caller and at most threads - 1 helpers.
template <class Schedule>
void parallel_for(std::int64_t tasks, int threads, Schedule&& schedule,
                  const std::function<void(std::int64_t)>& body) {
  struct Region {
    std::atomic<std::int64_t> next{0};
    std::atomic<std::int64_t> finished{0};
    std::int64_t tasks = 0;
    const std::function<void(std::int64_t)>* body = nullptr;
    std::mutex mutex;
    std::condition_variable all_finished;

    void work() {
      for (;;) {
        const std::int64_t task = next.fetch_add(1);
        if (task >= tasks) return;
        (*body)(task);
        if (finished.fetch_add(1) + 1 == tasks) {
          const std::lock_guard<std::mutex> lock(mutex);
          all_finished.notify_all();
        }
      }
    }
  };
  if (tasks <= 0) return;
  auto region = std::make_shared<Region>();
  region->tasks = tasks;
  region->body = &body;  // nobody reads it once all tasks have been claimed
  for (std::int64_t helper = 1; helper < threads && helper < tasks; ++helper) {
    schedule([region] { region->work(); });
  }
  region->work();
  for (int spin = 0; spin < 4096 && region->finished.load() < tasks; ++spin) {
  }
  std::unique_lock<std::mutex> lock(region->mutex);
  region->all_finished.wait(lock, [&] { return region->finished.load() == tasks; });
}

// CHAINRULE_NUM_THREADS, or else the processors this process may run on.
inline int default_threads() {
  if (const char* text = std::getenv("CHAINRULE_NUM_THREADS")) {
    char* end = nullptr;
    const long threads = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || threads < 1 || threads > 1024) {
      throw std::invalid_argument("CHAINRULE_NUM_THREADS must be an integer in [1, 1024], got '" +
                                  std::string(text) + "'");
    }
    return static_cast<int>(threads);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned processors = std::thread::hardware_concurrency();
  return processors > 0 ? static_cast<int>(processors) : 1;
}

// Threads that sleep between loops. It grows to what a loop asks for and lives as long as the process;
// a forked child, which inherits no threads, gets its own.
class Pool {
 public:
  static Pool& instance() {
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load();
    const long owner = process();
    while (pool == nullptr || pool->owner_ != owner) {
      Pool* fresh = new Pool(owner);
      if (current.compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  void run(std::int64_t tasks, int threads, const std::function<void(std::int64_t)>& body) {
    grow(threads - 1);
    parallel_for(tasks, threads, [this](std::function<void()> task) { push(std::move(task)); }, body);
  }

 private:
  explicit Pool(long owner) : owner_(owner) {}

  static long process() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
  }

  void grow(int threads) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (; size_ < threads; ++size_) {
      std::thread([this] { serve(); }).detach();
    }
  }

  void push(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

  void serve() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return !queue_.empty(); });
        task = std::move(queue_.front());
        queue_.pop_front();
      }
      task();
    }
  }

  const long owner_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  int size_ = 0;
};

}  // namespace chainrule
