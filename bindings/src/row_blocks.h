// Spreading the rows of an elementwise operation over the pool.
#pragma once

#include "parallel.h"

namespace stars {

// A barrier costs about as much as this many floats take to stream through one core.
constexpr int64_t kFloatsPerTask = 16 * 1024;

// Calls f(row) for every row of `width` floats.
template <class F>
void for_row_blocks(int64_t rows, int64_t width, F&& f) {
  const int64_t rows_per_task = kFloatsPerTask / width + 1;
  parallel((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
    const int64_t end = task * rows_per_task + rows_per_task;
    for (int64_t row = task * rows_per_task; row < rows && row < end; ++row) f(row);
  });
}

}  // namespace stars
