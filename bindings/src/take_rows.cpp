// Rows picked out of a matrix.
#include <cstring>

#include "ops.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {

void take_rows(const stars_take_rows_params& p) {
  for_row_blocks(p.rows, p.width, [&](int64_t row) {
    std::memcpy(p.out + row * p.width, p.x + p.index[row] * p.width, p.width * sizeof(float));
  });
}

}  // namespace stars::STARS_ISA
