// A small thread pool: the caller and its workers take tasks 0..count-1. Workers spin for a short while between
// calls, because a decode step makes dozens of them a few microseconds apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace stars {

// A task's code and what it has captured, small enough to lie in the cache line through which a worker gets it.
// (No member functions: this header is compiled for several instruction sets, see ops.h.)
struct Body {
  void (*call)(const void* captured, int64_t task);
  alignas(8) unsigned char captured[40];
};

// Calls `body` for every task in [0, count), on up to num_threads() threads; returns when all are done. Which thread
// runs a task is not fixed, so a task's arithmetic must not depend on it. What a task throws ends that task;
// std::bad_alloc is thrown here once no other is running.
void parallel_for(int64_t count, const Body& body);

int num_threads();
void set_num_threads(int count);  // >= 0; from the next call of parallel_for on
bool set_alone(bool alone);       // whether parallel_for keeps to its caller's thread, of this thread; what was

// As parallel_for. What `f` captures is copied if it is small, so that a worker need not fetch it from the caller's
// stack: capture values then, not references to locals.
template <class F>
void parallel(int64_t count, F&& f) {
  using Function = std::remove_cvref_t<F>;
  Body body;
  constexpr bool fits = sizeof(Function) <= sizeof(Body::captured) && alignof(Function) <= 8;
  if constexpr (fits && std::is_trivially_copyable_v<Function>) {
    std::memcpy(body.captured, &f, sizeof f);
    body.call = [](const void* captured, int64_t task) { (*static_cast<const Function*>(captured))(task); };
  } else {
    const Function* pointer = &f;
    std::memcpy(body.captured, &pointer, sizeof pointer);
    body.call = [](const void* captured, int64_t task) { (**static_cast<const Function* const*>(captured))(task); };
  }
  parallel_for(count, body);
}

}  // namespace stars
