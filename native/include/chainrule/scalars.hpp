// Straight-line arithmetic on scalars: what an update finds once for each tensor (counts, bias corrections,
// rates) before the kernel runs. Each operation would be a call of the framework, and there are hundreds.
//
// A scalar is a word: a float32 (.f), an int32 (.i) or a truth value (.b), 0 or 1. Integers wrap around.
// Operations have the names and the meaning of torch's, float_to_int and int_rem those of XLA: toward zero and
// saturating, and the dividend for a divisor of zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace chainrule {

using Word = std::uint32_t;

namespace scalars {

inline float f(Word word) {
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
inline Word word(float value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline std::int32_t i(Word word) { return static_cast<std::int32_t>(word); }
inline Word truth(bool value) { return value ? 1 : 0; }
inline Word remainder(Word a, Word b) {
  const std::int32_t by = i(b);
  return by == 0 ? a : by == -1 ? 0 : static_cast<Word>(i(a) % by);
}
inline Word integer(float value) {
  if (value != value) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value < -2147483648.0f) return static_cast<Word>(INT32_MIN);
  return static_cast<Word>(static_cast<std::int32_t>(value));
}

}  // namespace scalars

struct ScalarOp {
  const char* name;
  Word (*apply)(Word a, Word b, Word c);
};

inline const std::vector<ScalarOp>& scalar_ops() {
  using namespace scalars;
  static const std::vector<ScalarOp> ops = {
      {"add.f", [](Word a, Word b, Word) { return word(f(a) + f(b)); }},
      {"sub.f", [](Word a, Word b, Word) { return word(f(a) - f(b)); }},
      {"mul.f", [](Word a, Word b, Word) { return word(f(a) * f(b)); }},
      {"div.f", [](Word a, Word b, Word) { return word(f(a) / f(b)); }},
      {"fmod.f", [](Word a, Word b, Word) { return word(std::fmod(f(a), f(b))); }},
      {"pow.f", [](Word a, Word b, Word) { return word(std::pow(f(a), f(b))); }},
      {"neg.f", [](Word a, Word, Word) { return a ^ 0x80000000u; }},
      {"abs.f", [](Word a, Word, Word) { return a & 0x7fffffffu; }},
      {"reciprocal.f", [](Word a, Word, Word) { return word(1 / f(a)); }},
      {"sqrt.f", [](Word a, Word, Word) { return word(std::sqrt(f(a))); }},
      {"rsqrt.f", [](Word a, Word, Word) { return word(1 / std::sqrt(f(a))); }},
      {"square.f", [](Word a, Word, Word) { return word(f(a) * f(a)); }},
      {"exp.f", [](Word a, Word, Word) { return word(std::exp(f(a))); }},
      {"expm1.f", [](Word a, Word, Word) { return word(std::expm1(f(a))); }},
      {"log.f", [](Word a, Word, Word) { return word(std::log(f(a))); }},
      {"log1p.f", [](Word a, Word, Word) { return word(std::log1p(f(a))); }},
      {"float_to_int.f", [](Word a, Word, Word) { return integer(f(a)); }},
      {"floor.f", [](Word a, Word, Word) { return word(std::floor(f(a))); }},
      // NaN in either is the result.
      {"minimum.f", [](Word a, Word b, Word) { return f(b) != f(b) || f(b) < f(a) ? b : a; }},
      {"maximum.f", [](Word a, Word b, Word) { return f(b) != f(b) || f(b) > f(a) ? b : a; }},
      {"lt.f", [](Word a, Word b, Word) { return truth(f(a) < f(b)); }},
      {"le.f", [](Word a, Word b, Word) { return truth(f(a) <= f(b)); }},
      {"gt.f", [](Word a, Word b, Word) { return truth(f(a) > f(b)); }},
      {"ge.f", [](Word a, Word b, Word) { return truth(f(a) >= f(b)); }},
      {"eq.f", [](Word a, Word b, Word) { return truth(f(a) == f(b)); }},
      {"ne.f", [](Word a, Word b, Word) { return truth(f(a) != f(b)); }},
      {"isfinite.f", [](Word a, Word, Word) { return truth((a & 0x7f800000u) != 0x7f800000u); }},
      {"where.f", [](Word a, Word b, Word c) { return a != 0 ? b : c; }},

      {"add.i", [](Word a, Word b, Word) { return a + b; }},
      {"sub.i", [](Word a, Word b, Word) { return a - b; }},
      {"mul.i", [](Word a, Word b, Word) { return a * b; }},
      {"fmod.i", [](Word a, Word b, Word) { return remainder(a, b); }},
      {"int_rem.i", [](Word a, Word b, Word) { return remainder(a, b); }},
      {"neg.i", [](Word a, Word, Word) { return 0 - a; }},
      {"minimum.i", [](Word a, Word b, Word) { return i(a) < i(b) ? a : b; }},
      {"maximum.i", [](Word a, Word b, Word) { return i(a) > i(b) ? a : b; }},
      {"lt.i", [](Word a, Word b, Word) { return truth(i(a) < i(b)); }},
      {"le.i", [](Word a, Word b, Word) { return truth(i(a) <= i(b)); }},
      {"gt.i", [](Word a, Word b, Word) { return truth(i(a) > i(b)); }},
      {"ge.i", [](Word a, Word b, Word) { return truth(i(a) >= i(b)); }},
      {"eq.i", [](Word a, Word b, Word) { return truth(a == b); }},
      {"ne.i", [](Word a, Word b, Word) { return truth(a != b); }},
      {"where.i", [](Word a, Word b, Word c) { return a != 0 ? b : c; }},

      {"bitwise_and.b", [](Word a, Word b, Word) { return a & b; }},
      {"bitwise_or.b", [](Word a, Word b, Word) { return a | b; }},
      {"bitwise_xor.b", [](Word a, Word b, Word) { return a ^ b; }},
      {"bitwise_not.b", [](Word a, Word, Word) { return a ^ 1; }},
      {"eq.b", [](Word a, Word b, Word) { return truth(a == b); }},
      {"ne.b", [](Word a, Word b, Word) { return truth(a != b); }},
      {"where.b", [](Word a, Word b, Word c) { return a != 0 ? b : c; }},

      {"to.f.f", [](Word a, Word, Word) { return a; }},
      {"to.i.i", [](Word a, Word, Word) { return a; }},
      {"to.b.b", [](Word a, Word, Word) { return a; }},
      {"to.i.f", [](Word a, Word, Word) { return word(static_cast<float>(i(a))); }},
      {"to.b.f", [](Word a, Word, Word) { return word(static_cast<float>(a)); }},
      {"to.b.i", [](Word a, Word, Word) { return a; }},
      {"to.f.b", [](Word a, Word, Word) { return truth(f(a) != 0); }},
      {"to.i.b", [](Word a, Word, Word) { return truth(a != 0); }},
  };
  return ops;
}

// words[result] = apply(words[a], words[b], words[c])
struct ScalarInstruction {
  Word (*apply)(Word a, Word b, Word c);
  std::int32_t result, a, b, c;
};

// A word in the memory of a tensor: its element `offset`, of `bytes` 4, or 1 for a truth value.
struct ScalarPlace {
  std::int32_t word, tensor, offset, bytes;
};

inline void run_scalars(const std::vector<ScalarInstruction>& code, const std::vector<ScalarPlace>& loads,
                        const std::vector<ScalarPlace>& stores, Word* words,
                        const std::vector<std::uintptr_t>& tensors) {
  const auto at = [&](const ScalarPlace& place) {
    return reinterpret_cast<unsigned char*>(tensors[static_cast<std::size_t>(place.tensor)]) +
           std::int64_t{place.offset} * place.bytes;
  };
  for (const ScalarPlace& place : loads) {
    if (place.bytes == 1) {
      words[place.word] = *at(place) != 0;
    } else {
      std::memcpy(words + place.word, at(place), sizeof(Word));
    }
  }
  for (const ScalarInstruction& step : code) {
    words[step.result] = step.apply(words[step.a], words[step.b], words[step.c]);
  }
  for (const ScalarPlace& place : stores) {
    if (place.bytes == 1) {
      *at(place) = static_cast<unsigned char>(words[place.word]);
    } else {
      std::memcpy(at(place), words + place.word, sizeof(Word));
    }
  }
}

}  // namespace chainrule
