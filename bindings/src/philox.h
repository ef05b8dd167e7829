// The counter-based random numbers of the sampler; the law is in kernels/philox.py.
#pragma once

#include <cstdint>

namespace stars::philox {

constexpr uint32_t multiplier_0 = 0xD2511F53, multiplier_1 = 0xCD9E8D57;
constexpr uint32_t weyl_0 = 0x9E3779B9, weyl_1 = 0xBB67AE85;
constexpr uint32_t rounds = 10;
constexpr uint32_t kind_token_noise = 0, kind_accept = 1;

}  // namespace stars::philox

#ifdef STARS_ISA
#include "simd.h"

namespace stars::STARS_ISA {

// What the counters of one draw's token noise have in common.
struct noise_stream {
  uint64_t seed;
  uint32_t position, attempt, stream;
};

// No noise is larger: -log(-log(1 - 2^-25)) is 17.3287.
constexpr float highest_noise = 17.33f;

// The lower halves of the 64-bit lanes, multiplied.
STARS_INLINE longs multiply_low_halves(longs a, uint32_t b) {
#if defined(__AVX512F__)
  return (longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(STARS_SIMD_X86)
  return (longs)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * (uint64_t)b;
#endif
}

// The four words of every block in `blocks`, out[j] holding word j of each.
STARS_INLINE void philox_words(const noise_stream& noise, words blocks, words out[4]) {
  // Even and odd lanes apart, each word in the lower half of a 64-bit lane; what lies in the upper halves does no harm.
  const uint32_t attempt = noise.attempt | philox::kind_token_noise << 24;
  longs c0[2] = {bits_as<longs>(blocks), bits_as<longs>(blocks) >> 32}, c1[2], c2[2], c3[2];
  for (int half = 0; half < 2; ++half) {
    c1[half] = longs{} + (uint64_t)noise.position;
    c2[half] = longs{} + (uint64_t)attempt;
    c3[half] = longs{} + (uint64_t)noise.stream;
  }
  uint32_t key_0 = (uint32_t)noise.seed, key_1 = (uint32_t)(noise.seed >> 32);
  for (uint32_t round = 0; round < philox::rounds; ++round) {
    for (int half = 0; half < 2; ++half) {
      const longs product_0 = multiply_low_halves(c0[half], philox::multiplier_0);
      const longs product_1 = multiply_low_halves(c2[half], philox::multiplier_1);
      c0[half] = (product_1 >> 32) ^ c1[half] ^ (uint64_t)key_0;
      c2[half] = (product_0 >> 32) ^ c3[half] ^ (uint64_t)key_1;
      c1[half] = product_1;
      c3[half] = product_0;
    }
    key_0 += philox::weyl_0;
    key_1 += philox::weyl_1;
  }
  const longs low = longs{} + (uint64_t)0xffffffffu;
  out[0] = bits_as<words>((c0[0] & low) | c0[1] << 32);
  out[1] = bits_as<words>((c1[0] & low) | c1[1] << 32);
  out[2] = bits_as<words>((c2[0] & low) | c2[1] << 32);
  out[3] = bits_as<words>((c3[0] & low) | c3[1] << 32);
}

// Standard Gumbel noise of words: -log(-log u), u = (k + 0.5) / 2^24, k = word >> 8.
//
// -log u is the log of 1 + f times a power of two with f exact in every case: below 1/2 from k + 0.5, which 24 bits
// hold; above from d = 1 - u, which they hold as well, as -d or, where that is below sqrt(1/2), as 1 - 2 d.
STARS_INLINE floats gumbel(words word) {
  const ints k = bits_as<ints>(word >> 8);
  const ints upper = k >= splat((int32_t)(1 << 23));
  floats f, exponent;
  split(__builtin_convertvector(k, floats) + splat(0.5f), f, exponent);  // wrong in upper lanes, replaced below
  exponent -= splat(24.0f);
  const floats d = (__builtin_convertvector(splat((int32_t)(1 << 24)) - k, floats) - splat(0.5f)) * splat(0x1p-24f);
  const ints middle = d > splat(0.29289f);
  const floats f_upper = middle ? splat(1.0f) - (d + d) : -d;
  f = upper ? f_upper : f;
  exponent = upper ? (middle ? splat(-1.0f) : splat(0.0f)) : exponent;
  return -log(-log_of_parts(f, exponent));
}

// At least gumbel(word), and within 0.07 of it where that is large, for a fifth of the price: -log u >= 1 - u, and a
// float's bits, read as a number, are a piecewise linear log2 of it that is never too high.
STARS_INLINE floats gumbel_bound(words word) {
  const ints k = bits_as<ints>(word >> 8);
  const floats d = (__builtin_convertvector(splat((int32_t)(1 << 24)) - k, floats) - splat(0.5f)) * splat(0x1p-24f);
  const floats log2_d = __builtin_convertvector(bits_as<ints>(d), floats);
  constexpr float ln2 = 0.69314718f, slack = 1e-3f;  // more than all roundings here and in gumbel()
  return fma(log2_d, splat(-ln2 * 0x1p-23f), splat(127.0f * ln2 + slack));
}

// Where list entry i of one vector of blocks has to lie so that noise_of_blocks returns the entries in order.
STARS_INLINE ints block_order() {
#if defined(__AVX512F__)
  return ints{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
#elif defined(__AVX2__)
  return ints{0, 2, 4, 6, 1, 3, 5, 7};
#else
  return ints{0, 1, 2, 3};
#endif
}

// The words of blocks first[block_order()[lane]] in token order: out[j] holds vector_width / 4 whole blocks.
STARS_INLINE void words_in_token_order(const noise_stream& noise, words blocks, words out[4]) {
  words w[4];
  philox_words(noise, blocks, w);
  // A transpose of 4 x 4 words within each 128-bit lane.
#if defined(__AVX512F__)
#define STARS_LOW_PAIRS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define STARS_HIGH_PAIRS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define STARS_LOW_HALVES 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define STARS_HIGH_HALVES 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif defined(__AVX2__)
#define STARS_LOW_PAIRS 0, 8, 1, 9, 4, 12, 5, 13
#define STARS_HIGH_PAIRS 2, 10, 3, 11, 6, 14, 7, 15
#define STARS_LOW_HALVES 0, 1, 8, 9, 4, 5, 12, 13
#define STARS_HIGH_HALVES 2, 3, 10, 11, 6, 7, 14, 15
#else
#define STARS_LOW_PAIRS 0, 4, 1, 5
#define STARS_HIGH_PAIRS 2, 6, 3, 7
#define STARS_LOW_HALVES 0, 1, 4, 5
#define STARS_HIGH_HALVES 2, 3, 6, 7
#endif
  const words a = __builtin_shufflevector(w[0], w[1], STARS_LOW_PAIRS);
  const words b = __builtin_shufflevector(w[2], w[3], STARS_LOW_PAIRS);
  const words c = __builtin_shufflevector(w[0], w[1], STARS_HIGH_PAIRS);
  const words d = __builtin_shufflevector(w[2], w[3], STARS_HIGH_PAIRS);
  out[0] = __builtin_shufflevector(a, b, STARS_LOW_HALVES);
  out[1] = __builtin_shufflevector(a, b, STARS_HIGH_HALVES);
  out[2] = __builtin_shufflevector(c, d, STARS_LOW_HALVES);
  out[3] = __builtin_shufflevector(c, d, STARS_HIGH_HALVES);
}

}  // namespace stars::STARS_ISA
#endif
