// RMS norm with the addition of the residual stream in it.
#include <cmath>

#include "ops.h"
#include "row_blocks.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

// Calls f(first column, how many) for every vector of a row, the last of which may be a part.
template <class F>
STARS_INLINE void for_vectors(int64_t width, F&& f) {
  int64_t k = 0;
  for (; k + vector_width <= width; k += vector_width) f(k, int64_t{vector_width});
  if (k < width) f(k, width - k);
}

void normalise_row(const stars_rms_norm_params& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* out = p.out + row * p.out_stride;
  floats squares = {};
  if (p.residual) {
    float* residual = p.residual + row * p.hidden;
    for_vectors(p.hidden, [&](int64_t k, int64_t count) {
      const floats y = load_first(residual + k, count) + load_first(x + k, count);
      store_first(residual + k, y, count);
      squares = fma(y, y, squares);
    });
    x = residual;
  } else {
    for_vectors(p.hidden, [&](int64_t k, int64_t count) {
      const floats y = load_first(x + k, count);
      squares = fma(y, y, squares);
    });
  }
  const float mean = sum_of(squares) / static_cast<float>(p.hidden);
  const floats scale = splat(1.0f / std::sqrt(mean + p.eps));
  for_vectors(p.hidden, [&](int64_t k, int64_t count) {
    store_first(out + k, load_first(p.weight + k, count) * (load_first(x + k, count) * scale), count);
  });
}

}  // namespace

void rms_norm(const stars_rms_norm_params& p) {
  for_row_blocks(p.rows, p.hidden, [&](int64_t row) { normalise_row(p, row); });
}

}  // namespace stars::STARS_ISA
