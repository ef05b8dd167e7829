#include <cstring>

#include "ops.h"

namespace stars::STARS_ISA {

void take_rows(const stars_take_rows_params& p) {
  for (int64_t i = 0; i < p.rows; ++i)
    std::memcpy(p.out + i * p.width, p.x + p.index[i] * p.width, p.width * sizeof(float));
}

}  // namespace stars::STARS_ISA
