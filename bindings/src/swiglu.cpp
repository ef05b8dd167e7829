// The gate of the MLP.
#include "ops.h"
#include "row_blocks.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

STARS_INLINE floats silu(floats x) { return x / (splat(1.0f) + exp(-x)); }

}  // namespace

void swiglu(const stars_swiglu_params& p) {
  // An exponential and a division a value take about as long as eight values of plain streaming.
  for_row_blocks(p.rows, 8 * p.intermediate, [&](int64_t row) {
    const float* gate = p.gate_up + row * 2 * p.intermediate;
    const float* up = gate + p.intermediate;
    float* out = p.out + row * p.intermediate;
    int64_t i = 0;
    for (; i + vector_width <= p.intermediate; i += vector_width) store(out + i, silu(load(gate + i)) * load(up + i));
    const int64_t rest = p.intermediate - i;
    if (rest > 0) store_first(out + i, silu(load_first(gate + i, rest)) * load_first(up + i, rest), rest);
  });
}

}  // namespace stars::STARS_ISA
