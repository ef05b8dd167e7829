// The random numbers of the C interface: single words and uniforms here, noise where the sampler takes it from.
#include "philox.h"

#include "error.h"
#include "ops.h"

namespace stars {

namespace base {
void gumbel_noise(uint64_t, uint32_t, uint32_t, uint32_t, int64_t, float*);
}
namespace avx2 {
void gumbel_noise(uint64_t, uint32_t, uint32_t, uint32_t, int64_t, float*);
}
namespace avx512 {
void gumbel_noise(uint64_t, uint32_t, uint32_t, uint32_t, int64_t, float*);
}

}  // namespace stars

int32_t stars_philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t out[4]) {
  if (!out) return stars::fail("stars_philox", "out must not be null");
  namespace philox = stars::philox;
  uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
  for (uint32_t round = 0; round < philox::rounds; ++round) {
    const uint64_t product_0 = (uint64_t)c0 * philox::multiplier_0, product_1 = (uint64_t)c2 * philox::multiplier_1;
    c0 = (uint32_t)(product_1 >> 32) ^ c1 ^ key_0;
    c2 = (uint32_t)(product_0 >> 32) ^ c3 ^ key_1;
    c1 = (uint32_t)product_1;
    c3 = (uint32_t)product_0;
    key_0 += philox::weyl_0;
    key_1 += philox::weyl_1;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
  return STARS_OK;
}

double stars_accept_uniform(uint64_t seed, uint32_t attempt, uint32_t segment, uint32_t sample) {
  uint32_t out[4];
  stars_philox(seed, 0, 0, attempt | stars::philox::kind_accept << 24, segment | sample << 20, out);
  return ((out[0] >> 8) + 0.5) * 0x1p-24;
}

int32_t stars_gumbel(uint64_t seed, uint32_t position, uint32_t attempt, uint32_t stream, int64_t vocab, float* out) {
  if (vocab < 0 || vocab > INT32_MAX) return stars::fail("stars_gumbel", "vocab must be >= 0 and below 2^31");
  if (vocab > 0 && !out) return stars::fail("stars_gumbel", "out must not be null");
  auto* noise = stars::base::gumbel_noise;
#ifdef STARS_X86
  // What the sampler of the table draws: that of "avx512_bf16" is a table of its own with avx512's sampler.
  auto* const sampler = stars::ops().sample_step;
  if (sampler == stars::avx512::table.sample_step) noise = stars::avx512::gumbel_noise;
  if (sampler == stars::avx2::table.sample_step) noise = stars::avx2::gumbel_noise;
#endif
  noise(seed, position, attempt, stream, vocab, out);
  return STARS_OK;
}
