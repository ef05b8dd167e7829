// The gate of the MLP.
#include "ops.h"
#include "row_blocks.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

STARS_INLINE floats silu(floats x) { return x / (splat(1.0f) + exp(-x)); }

STARS_INLINE floats gelu_tanh(floats x) {
  const floats inner = splat(0.7978845608f) * (x + splat(0.044715f) * (x * x * x));
  return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}

template <class F>
STARS_INLINE void gate_row(const stars_swiglu_params& p, int64_t row, F&& activation) {
  const float* gate = p.gate_up + row * 2 * p.intermediate;
  const float* up = gate + p.intermediate;
  float* out = p.out + row * p.intermediate;
  int64_t i = 0;
  for (; i + vector_width <= p.intermediate; i += vector_width)
    store(out + i, activation(load(gate + i)) * load(up + i));
  const int64_t rest = p.intermediate - i;
  if (rest > 0) store_first(out + i, activation(load_first(gate + i, rest)) * load_first(up + i, rest), rest);
}

}  // namespace

void swiglu(const stars_swiglu_params& p) {
  // An exponential and a division a value take about as long as eight values of plain streaming.
  for_row_blocks(p.rows, 8 * p.intermediate, [&](int64_t row) {
    if (p.activation == STARS_GELU_TANH)
      gate_row(p, row, [](floats x) { return gelu_tanh(x); });
    else
      gate_row(p, row, [](floats x) { return silu(x); });
  });
}

}  // namespace stars::STARS_ISA
