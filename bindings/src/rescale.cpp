// A factor on every value, and a soft bound.
#include "ops.h"
#include "row_blocks.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

STARS_INLINE floats rescaled(floats x, float scale, float softcap) {
  x = x * splat(scale);
  return softcap > 0.0f ? splat(softcap) * tanh(x / splat(softcap)) : x;
}

}  // namespace

void rescale(const stars_rescale_params& p) {
  for_row_blocks(p.rows, p.softcap > 0.0f ? 8 * p.width : p.width, [&](int64_t row) {
    float* x = p.x + row * p.width;
    int64_t i = 0;
    for (; i + vector_width <= p.width; i += vector_width) store(x + i, rescaled(load(x + i), p.scale, p.softcap));
    const int64_t rest = p.width - i;
    if (rest > 0) store_first(x + i, rescaled(load_first(x + i, rest), p.scale, p.softcap), rest);
  });
}

}  // namespace stars::STARS_ISA
