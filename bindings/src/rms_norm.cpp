// RMS norm with the addition of the residual stream in it.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "row_blocks.h"

namespace stars::STARS_ISA {
namespace {

constexpr int kLanes = 32;  // partial sums, in a fixed order whatever the vector width

void normalise_row(const stars_rms_norm_params& p, int64_t row) {
  const float* x = p.x + row * p.hidden;
  float* out = p.out + row * p.hidden;
  if (p.residual) {
    float* residual = p.residual + row * p.hidden;
    for (int64_t k = 0; k < p.hidden; ++k) residual[k] += x[k];
    x = residual;
  }
  float partial[kLanes] = {};
  const int64_t whole = p.hidden / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += x[k + lane] * x[k + lane];
  for (int64_t k = whole; k < p.hidden; ++k) partial[k - whole] += x[k] * x[k];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) partial[lane] += partial[lane + half];
  const float scale = 1.0f / std::sqrt(partial[0] / static_cast<float>(p.hidden) + p.eps);
  for (int64_t k = 0; k < p.hidden; ++k) out[k] = p.weight[k] * (x[k] * scale);
}

}  // namespace

void rms_norm(const stars_rms_norm_params& p) {
  for_row_blocks(p.rows, p.hidden, [&](int64_t row) { normalise_row(p, row); });
}

}  // namespace stars::STARS_ISA
