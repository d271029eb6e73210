// Element-wise loops that were compiled for a chain (native/loops.py), all of a step in one XLA FFI call.
//
// A program names its loops by a key, not by their addresses: XLA may keep what it compiled longer than a process lives.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "doors.hpp"
#include "handlers.hpp"

namespace py = pybind11;

namespace chainrule {
namespace {

// Elements [begin, end) of the tensors behind some pointers.
using CompiledLoop = void (*)(void* const* pointers, std::int64_t begin, std::int64_t end);

class Compiled {
 public:
  static Compiled& instance() {
    static auto* const compiled = new Compiled;  // handlers may run while the process ends
    return *compiled;
  }

  void add(const std::string& key, const std::vector<std::uintptr_t>& addresses) {
    std::vector<CompiledLoop> loops;
    for (std::size_t i = 0; i < addresses.size(); ++i) {
      if (addresses[i] == 0) refuse(at("addresses", i), "the address of a function", "null");
      loops.push_back(reinterpret_cast<CompiledLoop>(addresses[i]));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    loops_.emplace(key, std::move(loops));
  }

  // They stay where they are: nothing is ever taken out.
  const std::vector<CompiledLoop>& of(const std::string& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = loops_.find(key);
    if (found == loops_.end()) {
      refuse("loops", "compiled in this process", "those of another, '" + key + "'", "trace the step again");
    }
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::vector<CompiledLoop>> loops_;
};

struct LoopCall {
  CompiledLoop loop;
  std::vector<void*> pointers;
  std::int64_t size;
};

// `rows` holds, for each call, its loop, how many buffers it takes, and these by number: operands, then results. The last
// one tells how many elements there are.
std::vector<LoopCall> calls_of(const std::vector<CompiledLoop>& loops, ffi::Span<const std::int32_t> rows,
                               const std::vector<ffi::AnyBuffer>& buffers) {
  std::vector<LoopCall> calls;
  const auto number = [&](std::size_t i, std::size_t bound) {
    in_range<std::int64_t>("rows: length", static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(i) + 1,
                           std::numeric_limits<std::int64_t>::max());
    const std::int64_t last = static_cast<std::int64_t>(bound) - 1;
    return static_cast<std::size_t>(in_range<std::int64_t>(at("rows", i), rows.begin()[i], 0, last));
  };
  for (std::size_t i = 0; i < rows.size();) {
    LoopCall& call = calls.emplace_back(LoopCall{loops[number(i, loops.size())], {}, 0});
    const std::size_t count = number(i + 1, rows.size());
    for (std::size_t k = i + 2; k < i + 2 + count; ++k) {
      const ffi::AnyBuffer& buffer = buffers[number(k, buffers.size())];
      call.pointers.push_back(buffer.untyped_data());
      call.size = static_cast<std::int64_t>(buffer.element_count());
    }
    i += 2 + count;
  }
  return calls;
}

ffi::Error loops(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, std::string_view key,
                 ffi::Span<const std::int32_t> rows) {
  return checked([&] {
    std::vector<ffi::AnyBuffer> buffers;
    for (std::size_t i = 0; i < operands.size(); ++i) buffers.push_back(*operands.get<ffi::AnyBuffer>(i));
    for (std::size_t i = 0; i < results.size(); ++i) buffers.push_back(**results.get<ffi::AnyBuffer>(i));
    const auto calls = calls_of(Compiled::instance().of(std::string(key)), rows, buffers);
    const Plan plan = plan_of(calls, [](const LoopCall& c) { return c.size; }, [](const LoopCall&) { return 16; });
    plan.run(loop_on(pool), Subnormals::flush, [&](const Piece& piece) {
      const LoopCall& call = calls[piece.tensor];
      call.loop(call.pointers.data(), piece.begin, piece.end);
    });
  });
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    handler, loops,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<std::string_view>("key")
        .Attr<ffi::Span<const std::int32_t>>("rows"));

}  // namespace

XLA_FFI_Handler* loops_handler() { return handler; }

void add_loop_door(py::module_& m) {
  m.def("add_loops", [](const std::string& key, const std::vector<std::uintptr_t>& addresses) {
    Compiled::instance().add(key, addresses);
  }, py::arg("key"), py::arg("addresses"));
}

}  // namespace chainrule
