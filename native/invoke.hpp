// Calls of a function whose address and number of arguments are known only at run time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace chainrule {

using Word = std::uintptr_t;

constexpr std::size_t kArguments = 64;

namespace invoke_detail {

using Invoke = void (*)(Word, const Word*);

// A pointer and an int64_t are passed alike on every 64-bit platform that the kernel is built for.
template <std::size_t... kIndex>
void invoke(Word function, const Word* words) {
  reinterpret_cast<void (*)(decltype(Word{kIndex})...)>(function)(words[kIndex]...);
}

template <std::size_t... kIndex>
constexpr Invoke invoke_of(std::index_sequence<kIndex...>) {
  return &invoke<kIndex...>;
}

template <std::size_t... kCount>
constexpr std::array<Invoke, sizeof...(kCount)> invokes(std::index_sequence<kCount...>) {
  return {invoke_of(std::make_index_sequence<kCount>())...};
}

inline constexpr auto kInvokes = invokes(std::make_index_sequence<kArguments + 1>());

}  // namespace invoke_detail

// The function at an address, without a result, with `count` arguments of 64 bits.
inline void invoke(Word function, const Word* words, std::size_t count) {
  invoke_detail::kInvokes[count](function, words);
}

}  // namespace chainrule
