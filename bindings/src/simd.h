// Vectors of floats as wide as the instruction set has them, and the few elementary functions the operations share.
// (Not called math.h: that would hide the system's header of this name.)
//
// The bits of a result must not depend on what the compiler fuses, so every product that is added to something goes
// through fma().
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define STARS_SIMD_X86 1
#endif

#define STARS_INLINE inline __attribute__((always_inline))

namespace stars::STARS_ISA {

#if defined(__AVX512F__)
constexpr int vector_width = 16;
#elif defined(__AVX2__)
constexpr int vector_width = 8;
#else
constexpr int vector_width = 4;
#endif

typedef float floats __attribute__((vector_size(4 * vector_width)));
typedef int32_t ints __attribute__((vector_size(4 * vector_width)));  // also masks: 0 or -1
typedef uint32_t words __attribute__((vector_size(4 * vector_width)));
typedef uint64_t longs __attribute__((vector_size(4 * vector_width)));

STARS_INLINE floats splat(float x) { return x - floats{}; }
STARS_INLINE ints splat(int32_t x) { return x + ints{}; }
STARS_INLINE words splat(uint32_t x) { return x + words{}; }

STARS_INLINE ints lane_numbers() {
#if defined(__AVX512F__)
  return ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return ints{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return ints{0, 1, 2, 3};
#endif
}

template <class To, class From>
STARS_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return (To)from;
}

STARS_INLINE floats load(const float* from) {
  floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

STARS_INLINE void store(float* to, floats v) { std::memcpy(to, &v, sizeof v); }

// The first `count` (0 to vector_width) floats, then zeros; nothing after them is read or written.
STARS_INLINE floats load_first(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif defined(__AVX2__)
  return (floats)_mm256_maskload_ps(from, (__m256i)(lane_numbers() < splat((int32_t)count)));
#else
  floats v = {};
  for (int i = 0; i < vector_width; ++i)
    if (i < count) v[i] = from[i];
  return v;
#endif
}

STARS_INLINE void store_first(float* to, floats v, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, (__m256i)(lane_numbers() < splat((int32_t)count)), (__m256)v);
#else
  for (int i = 0; i < vector_width; ++i)
    if (i < count) to[i] = v[i];
#endif
}

// a * b + c, rounded once where the instruction set can.
STARS_INLINE floats fma(floats a, floats b, floats c) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The larger; the second if either is NaN.
STARS_INLINE floats max(floats a, floats b) {
#if defined(__AVX512F__)
  return (floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(STARS_SIMD_X86)
  return (floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

STARS_INLINE ints max(ints a, ints b) { return a > b ? a : b; }

// One bit per lane of a mask, lane 0 lowest.
STARS_INLINE uint32_t mask_bits(ints mask) {
#if defined(__AVX512F__)
  uint32_t bits = _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512());
  asm("" : "+r"(bits));  // out of the mask register, of which gcc 12 may store 16 bits and load 32
  return bits;
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(STARS_SIMD_X86)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < vector_width; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
#endif
}

STARS_INLINE bool any(ints mask) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)mask, _mm512_setzero_si512()) != 0;
#else
  return mask_bits(mask) != 0;
#endif
}

// All lanes by `op`, halves first: the same order on every call.
template <class V, class Op>
STARS_INLINE auto folded(V v, Op op) {
#if defined(__AVX512F__)
  const auto y = op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto y = v;
#endif
#if defined(__AVX2__)
  const auto half = op(__builtin_shufflevector(y, y, 0, 1, 2, 3), __builtin_shufflevector(y, y, 4, 5, 6, 7));
#else
  const auto half = y;
#endif
  const auto quarter = op(half, __builtin_shufflevector(half, half, 2, 3, 0, 1));
  return op(quarter[0], quarter[1]);
}

template <class V>
STARS_INLINE auto sum_of(V v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}

template <class V>
STARS_INLINE auto max_of(V v) {
  return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x, within 2 ulp; 0 below -104 (and of -inf), inf above 88.73; NaN stays.
STARS_INLINE floats exp(floats x) {
  x = x < splat(-110.0f) ? splat(-110.0f) : x;
  x = x > splat(100.0f) ? splat(100.0f) : x;
  const floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const floats shifted = fma(x, splat(1.44269504088896341f), magic);
  const floats n = shifted - magic;
  floats r = fma(n, splat(-0.693359375f), x);  // ln 2 in two parts, the first so short that n times it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  floats p = splat(1.9875691500e-4f);  // coefficients of Cephes' expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const floats tail = fma(p, r * r, r);
  const floats y = tail + splat(1.0f);
#if defined(__AVX512F__)
  return (floats)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)n);  // maskz: gcc warns of the plain one
#else
  const ints k = bits_as<ints>(shifted) - bits_as<ints>(magic);
  const ints k1 = k >> 1, k2 = k - k1;  // two steps, because 2^k alone may be no normal number
  return y * bits_as<floats>((k1 + 127) << 23) * bits_as<floats>((k2 + 127) << 23);
#endif
}

// log(1 + f) + exponent * ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1].
STARS_INLINE floats log_of_parts(floats f, floats exponent) {
  const floats z = f * f;
  floats p = splat(7.0376836292e-2f);  // coefficients of Cephes' logf
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  floats tail = fma(exponent, splat(-2.12194440e-4f), f * z * p);
  tail = fma(splat(-0.5f), z, tail);
  return fma(exponent, splat(0.693359375f), f + tail);
}

// x as (1 + f) * 2^exponent with 1 + f in [sqrt(1/2), sqrt(2)), for positive normal x; f is exact.
STARS_INLINE void split(floats x, floats& f, floats& exponent) {
  const ints shifted = bits_as<ints>(x) + (0x3f800000 - 0x3f3504f3);
  exponent = __builtin_convertvector((shifted >> 23) - 127, floats);
  f = bits_as<floats>((shifted & 0x7fffff) + 0x3f3504f3) - splat(1.0f);
}

// log x, within 2 ulp, for positive normal finite x only.
STARS_INLINE floats log(floats x) {
  floats f, exponent;
  split(x, f, exponent);
  return log_of_parts(f, exponent);
}

STARS_INLINE floats tanh(floats x) {
  const floats magnitude = bits_as<floats>(bits_as<ints>(x) & 0x7fffffff);
  const floats z = x * x;
  floats p = splat(-5.70498872745e-3f);  // coefficients of Cephes' tanhf, for small x
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const floats near = fma(p * z, x, x);
  const floats far = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  const floats far_signed = bits_as<floats>(bits_as<ints>(far) | (bits_as<ints>(x) & splat((int32_t)0x80000000)));
  return magnitude < splat(0.625f) ? near : far_signed;
}

}  // namespace stars::STARS_ISA
