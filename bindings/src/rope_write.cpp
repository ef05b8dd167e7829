// From the fused projection to attention's inputs: QK norm, rotation, and the write of keys and values.
#include "ops.h"
#include "row_blocks.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps).
STARS_INLINE float inverse_norm(const float* x, int64_t count, float eps) {
  floats sum = {};
  for (int64_t i = 0; i < count; i += vector_width) {
    const floats v = load_first(x + i, count - i < vector_width ? count - i : vector_width);
    sum = fma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(sum_of(sum) / (float)count + eps);
}

// Rotates one head of 2 * half floats; the norm's weight is applied first where there is one.
STARS_INLINE void rotate(const float* x, const float* cos, const float* sin, const float* norm, float eps, int64_t half,
                         float* out) {
  const floats scale = splat(norm ? inverse_norm(x, 2 * half, eps) : 1.0f);
  for (int64_t i = 0; i < half; i += vector_width) {
    const int64_t count = half - i < vector_width ? half - i : vector_width;
    floats x1 = load_first(x + i, count), x2 = load_first(x + half + i, count);
    if (norm) {
      x1 = x1 * scale * load_first(norm + i, count);
      x2 = x2 * scale * load_first(norm + half + i, count);
    }
    const floats c = load_first(cos + i, count), s = load_first(sin + i, count);
    store_first(out + i, fma(x1, c, -(x2 * s)), count);
    store_first(out + half + i, fma(x2, c, x1 * s), count);
  }
}

}  // namespace

void rope_write(const stars_rope_write_params& p) {
  const int64_t head_dim = p.kv.head_dim, half = head_dim / 2, kv_heads = p.kv.kv_heads;
  const int64_t kv_width = kv_heads * head_dim, q_width = p.heads * head_dim, width = q_width + 2 * kv_width;
  float* keys = p.batch.into_slab ? p.kv.k_slabs : p.kv.k_pages;
  float* values = p.batch.into_slab ? p.kv.v_slabs : p.kv.v_pages;
  for_row_blocks(p.batch.rows, 2 * width, [&](int64_t row) {
    const float* own = p.qkv + row * width;
    const float* cos = p.cos + p.batch.positions[row] * half;
    const float* sin = p.sin + p.batch.positions[row] * half;
    for (int64_t head = 0; head < p.heads; ++head)
      rotate(own + head * head_dim, cos, sin, p.q_norm, p.eps, half, p.q_out + row * q_width + head * head_dim);
    const int64_t slot = p.batch.slots[row];
    if (slot < 0) return;
    for (int64_t head = 0; head < kv_heads; ++head)
      rotate(own + q_width + head * head_dim, cos, sin, p.k_norm, p.eps, half,
             keys + slot * kv_width + head * head_dim);
    std::memcpy(values + slot * kv_width, own + q_width + kv_width, sizeof(float) * kv_width);
  });
}

}  // namespace stars::STARS_ISA
