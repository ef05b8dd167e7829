// How a product with a packed weight is spread over threads.
#pragma once

#include <algorithm>

#include "packing.h"
#include "parallel.h"
#include "simd.h"
#include "stars.h"

namespace stars::STARS_ISA {

// Calls run(params, begin, end, first, last) for rows begin .. end - 1 by panels first .. last - 1, until all are done.
// Work is shared by rows first, so that no task has more than `rows_of_task` where there are tasks enough, then by
// columns; by rows again where there are too few columns, down to `rows_of_tile` each.
template <class Run>
STARS_INLINE void for_product_tasks(const stars_linear_params& p, int64_t rows_of_task, int64_t rows_of_tile,
                                    const Run& run) {
  // A task is worth its barrier from about a microsecond on. More tasks than threads, so that a thread that is held up
  // leaves work to the others; and still more where each is long, so that all end together.
  constexpr int64_t kMinTask = 32 * 1024;  // multiply-adds
  constexpr int64_t kLong = 1024;          // times that, of a thread
  const int64_t panels = panel_count(p.out_features), threads = num_threads();
  const int64_t worth = p.rows * p.in_features * panels * kPanel / kMinTask;
  const int64_t tasks = std::clamp<int64_t>(worth / threads, 1, worth < kLong * threads ? 4 : 16) * threads;
  if (worth < 2 || threads == 1) return run(p, 0, p.rows, 0, panels);
  const int64_t blocks = (p.rows + rows_of_task - 1) / rows_of_task;
  const int64_t column_tasks = std::min(panels, tasks / std::clamp<int64_t>(blocks, 1, tasks));
  const int64_t row_tasks = std::clamp<int64_t>(tasks / column_tasks, 1, std::max<int64_t>(p.rows / rows_of_tile, 1));
  parallel(column_tasks * row_tasks, [run, column_tasks, row_tasks, params = &p](int64_t task) {
    const int64_t row_task = task / column_tasks, column_task = task % column_tasks;
    const int64_t panels = panel_count(params->out_features), rows = params->rows;
    run(*params, rows * row_task / row_tasks, rows * (row_task + 1) / row_tasks, panels * column_task / column_tasks,
        panels * (column_task + 1) / column_tasks);
  });
}

}  // namespace stars::STARS_ISA
