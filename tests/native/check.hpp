// A harness of a page: TEST(name) { CHECK(condition); } in any file, RUN in main.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                                    \
  static void name();                                 \
  static const Registered registered_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                           \
    }                                                                         \
  } while (false)

inline bool near(double a, double b, double tolerance = 1e-5) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

// Reproducible values in (-1, 1).
inline std::vector<float> draw(std::int64_t n, std::uint32_t seed) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& x : values) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
  }
  return values;
}

// Memory of exactly the right size, so that a sanitizer sees one element too far.
class Memory {
 public:
  Memory(const std::vector<float>& values, chainrule::Element element)
      : size_(static_cast<std::int64_t>(values.size())),
        element_(element),
        bytes_(static_cast<std::size_t>(size_ * chainrule::element_size(element))) {
    for (std::int64_t i = 0; i < size_; ++i) {
      const float x = values[static_cast<std::size_t>(i)];
      if (element == chainrule::Element::float32) {
        reinterpret_cast<float*>(bytes_.data())[i] = x;
      } else {
        reinterpret_cast<std::uint16_t*>(bytes_.data())[i] = element == chainrule::Element::bfloat16
                                                                 ? chainrule::baseline::narrow_bfloat16(x)
                                                                 : chainrule::baseline::narrow_float16(x);
      }
    }
  }

  chainrule::Buffer buffer() { return {size_ > 0 ? bytes_.data() : nothing_, size_, element_}; }

  double operator[](std::int64_t i) const {
    if (element_ == chainrule::Element::float32) {
      return static_cast<double>(reinterpret_cast<const float*>(bytes_.data())[i]);
    }
    const std::uint16_t half = reinterpret_cast<const std::uint16_t*>(bytes_.data())[i];
    return static_cast<double>(element_ == chainrule::Element::bfloat16
                                   ? chainrule::baseline::widen_bfloat16(half)
                                   : chainrule::baseline::widen_float16(half));
  }

 private:
  std::int64_t size_;
  chainrule::Element element_;
  std::vector<char> bytes_;
  char nothing_[1] = {};
};

inline chainrule::Loop on_threads(int threads) {
  return [threads](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
    chainrule::Pool::instance().run(tasks, threads, body);
  };
}
