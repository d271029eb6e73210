// Programs of scalars, in memory of exactly the right size.
#include <memory>
#include <string>
#include <vector>

#include "chainrule/scalars.hpp"
#include "check.hpp"

using namespace chainrule;

namespace {

Word (*op(const std::string& name))(Word, Word, Word) {
  for (const ScalarOp& each : scalar_ops()) {
    if (name == each.name) return each.apply;
  }
  return nullptr;
}

}  // namespace

TEST(a_program_loads_computes_and_stores) {
  const auto count = std::make_unique<std::int32_t>(6), largest = std::make_unique<std::int32_t>(INT32_MAX);
  const auto rates = std::make_unique<float[]>(2);
  const auto truth = std::make_unique<bool>(false);
  rates[1] = 0.5f;
  std::vector<Word> words(7);
  words[0] = 1;
  const std::vector<ScalarInstruction> code = {
      {op("add.i"), 1, 1, 0, 0}, {op("to.i.f"), 4, 1, 0, 0}, {op("mul.f"), 4, 4, 3, 0},
      {op("add.i"), 2, 2, 0, 0}, {op("lt.i"), 5, 2, 1, 0},
  };
  const std::vector<ScalarPlace> loads = {{1, 0, 0, 4}, {2, 1, 0, 4}, {3, 2, 1, 4}, {6, 3, 0, 1}};
  const std::vector<ScalarPlace> stores = {{1, 0, 0, 4}, {2, 1, 0, 4}, {4, 2, 1, 4}, {5, 3, 0, 1}};
  const auto at = [](const auto& pointer) { return reinterpret_cast<std::uintptr_t>(pointer.get()); };
  run_scalars(code, loads, stores, words.data(), {at(count), at(largest), at(rates), at(truth)});
  CHECK(*count == 7 && *largest == INT32_MIN && rates[0] == 0 && rates[1] == 3.5f);
  CHECK(*truth);
}

TEST(every_operation_takes_every_word) {
  const Word words[] = {0, 1, 0x3f800000u, 0x7f800000u, 0xffc00000u, 0x80000000u, 0x7fffffffu, 0xffffffffu};
  for (const ScalarOp& each : scalar_ops()) {
    for (const Word a : words) {
      for (const Word b : words) each.apply(a, b, a);
    }
  }
}
