// What every XLA FFI handler does: errors as XLA's, loops on XLA's threads.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "chainrule/batch.hpp"
#include "chainrule/parallel.hpp"
#include "xla/ffi/api/ffi.h"

namespace chainrule {

namespace ffi = xla::ffi;

// What a handler does; what is refused is the call's error.
template <class Body>
ffi::Error checked(Body body) {
  try {
    body();
  } catch (const std::invalid_argument& refused) {
    return ffi::Error::InvalidArgument(std::string("chainrule: ") + refused.what());
  }
  return ffi::Error::Success();
}

inline Loop loop_on(ffi::ThreadPool& pool) {
  const int threads = static_cast<int>(std::max<std::int64_t>(pool.num_threads(), 1));
  return [&pool, threads](std::int64_t tasks, const std::function<void(std::int64_t)>& body) {
    parallel_for(tasks, threads, [&pool](auto task) { pool.Schedule(std::move(task)); }, body);
  };
}

}  // namespace chainrule
