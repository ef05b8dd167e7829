// Rows of keys and values copied from one place to another, in all layers: a commit, or the copy of a shared page.
#include <cstring>

#include "ops.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {

void copy_rows(const stars_copy_rows_params& p) {
  for_row_blocks(p.layers * p.rows, 4 * p.width, [&](int64_t i) {
    const int64_t layer = i / p.rows, row = i % p.rows;
    const int64_t from = (layer * p.source_rows + p.source[row]) * p.width;
    const int64_t to = (layer * p.target_rows + p.target[row]) * p.width;
    std::memcpy(p.k_target + to, p.k_source + from, p.width * sizeof(float));
    std::memcpy(p.v_target + to, p.v_source + from, p.width * sizeof(float));
  });
}

}  // namespace stars::STARS_ISA
