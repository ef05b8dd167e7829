// The gate of the MLP.
#include <cmath>

#include "ops.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {

void swiglu(const stars_swiglu_params& p) {
  for_row_blocks(p.rows, 3 * p.intermediate, [&](int64_t row) {
    const float* gate = p.gate_up + row * 2 * p.intermediate;
    const float* up = gate + p.intermediate;
    float* out = p.out + row * p.intermediate;
    for (int64_t i = 0; i < p.intermediate; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  });
}

}  // namespace stars::STARS_ISA
