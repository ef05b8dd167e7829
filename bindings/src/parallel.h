// A small thread pool: the caller and its workers take tasks 0..count-1. Workers spin for a short while between
// calls, because a decode step makes dozens of them a few microseconds apart.
#pragma once

#include <cstdint>

namespace stars {

// Runs body(context, task) for every task in [0, count), on up to num_threads() threads; returns when all are done.
// Which thread runs a task is not fixed, so a task's arithmetic must not depend on it.
void parallel_for(int64_t count, void (*body)(void* context, int64_t task), void* context);

int num_threads();
void set_num_threads(int count);

template <class F>
void parallel(int64_t count, F&& f) {
  parallel_for(count, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &f);
}

}  // namespace stars
