// Rows of a packed weight, so that tied embeddings are stored once.
#include <bit>
#include <limits>

#include "formats.h"
#include "ops.h"
#include "packing.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {
namespace {

template <int32_t DTYPE>
void take_row(const stars_embedding_params& p, int64_t token, float* out) {
  const int64_t start = token / kPanel * panel_size(p.hidden, DTYPE), column = token % kPanel;
  if constexpr (DTYPE == STARS_F32) {
    const float* from = static_cast<const float*>(p.weight) + start;
    for (int64_t k = 0; k < p.hidden; ++k) out[k] = from[panel_place<DTYPE>(column, k)];
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(p.weight) + start;
    for (int64_t k = 0; k < p.hidden; ++k)
      out[k] = std::bit_cast<float>(uint32_t{from[panel_place<DTYPE>(column, k)]} << 16);
  }
}

}  // namespace

void embedding(const stars_embedding_params& p) {
  // Every value of a row lies in a cache line of its own (in order, so that they are prefetched).
  for_row_blocks(p.rows, 16 * p.hidden, [&](int64_t row) {
    const int64_t token = p.token_ids[row];
    float* out = p.out + row * p.hidden;
    if (token < 0 || token >= p.vocab) {  // there is nobody to tell here, and NaN does not pass unseen
      for (int64_t k = 0; k < p.hidden; ++k) out[k] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    if (p.dtype == STARS_F32)
      take_row<STARS_F32>(p, token, out);
    else if (p.dtype == STARS_BF16)
      take_row<STARS_BF16>(p, token, out);
    else if (is_quantised(p.dtype))
      unpack_row(p.weight, p.hidden, p.dtype, token, out);
    else
      take_row<STARS_BF16_DOT>(p, token, out);
  });
}

}  // namespace stars::STARS_ISA
