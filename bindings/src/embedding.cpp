// Rows of a packed weight, so that tied embeddings are stored once.
#include <bit>
#include <limits>

#include "ops.h"
#include "packing.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {

void embedding(const stars_embedding_params& p) {
  // Every value of a row lies in a cache line of its own (in order, so that they are prefetched).
  for_row_blocks(p.rows, 16 * p.hidden, [&](int64_t row) {
    const int64_t token = p.token_ids[row];
    float* out = p.out + row * p.hidden;
    if (token < 0 || token >= p.vocab) {  // there is nobody to tell here, and NaN does not pass unseen
      for (int64_t k = 0; k < p.hidden; ++k) out[k] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const int64_t start = token / kPanel * kPanel * p.hidden, column = token % kPanel;
    if (p.dtype == STARS_BF16) {
      const uint16_t* from = static_cast<const uint16_t*>(p.weight) + start + bf16_place(column);
      for (int64_t k = 0; k < p.hidden; ++k) out[k] = std::bit_cast<float>(uint32_t{from[k * kPanel]} << 16);
    } else {
      const float* from = static_cast<const float*>(p.weight) + start + column;
      for (int64_t k = 0; k < p.hidden; ++k) out[k] = from[k * kPanel];
    }
  });
}

}  // namespace stars::STARS_ISA
