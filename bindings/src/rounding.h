// Rows of x as a product with a matrix of 4 to 8 bits takes them: groups of 32 inputs of 16-bit integers and a scale.
#pragma once

#include <algorithm>
#include <cstring>

#include "formats.h"
#include "scratch.h"
#include "simd.h"

namespace stars::STARS_ISA {

// A group of a row of x: x = integer * scale.
struct Group {
  uint32_t pairs[kChunk / 2];  // of 16-bit integers
  float scale;
  float sum;         // of the rounded x
  int32_t start[2];  // minus the code's zero times the sum of the integers: of all, or of each half (kSmallOf16)
};

// The first `count` of 32 values of a row, in a group.
STARS_INLINE void round_group(const float* from, int64_t count, int zero, bool of_halves, Group& group) {
  constexpr int kVectors = kChunk / vector_width;
  typedef int16_t narrow __attribute__((vector_size(2 * vector_width)));
  floats x[kVectors];
  ints largest = {};
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load_first(from + v * vector_width, std::clamp<int64_t>(count - v * vector_width, 0, vector_width));
    largest = max(largest, bits_as<ints>(x[v]) & 0x7fffffff);  // as integers NaN is the largest
  }
  int32_t highest = std::max(max_of(largest), 0x0d800000);  // 2^-100: below, all are zeros or rounded by its steps
  if (highest >= 0x7f800000) highest = 0x7fc00000;          // NaN, of which nothing else is made
  float magnitude;
  std::memcpy(&magnitude, &highest, sizeof magnitude);
  const float inverse = 32767.0f / magnitude;
  const floats magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to the nearest integer, in the low bits
  ints sums[2] = {};
  for (int v = 0; v < kVectors; ++v) {
    // Sixteen bits of them: all there is, and zeros where x is NaN.
    const narrow values = __builtin_convertvector(
        bits_as<ints>(fma(x[v], splat(inverse), magic)) - bits_as<ints>(magic), narrow);
    std::memcpy(reinterpret_cast<int16_t*>(group.pairs) + v * vector_width, &values, sizeof values);
    sums[of_halves ? v * vector_width / 16 : 0] += __builtin_convertvector(values, ints);
  }
  const int32_t first = sum_of(sums[0]), second = of_halves ? sum_of(sums[1]) : 0;
  group.scale = magnitude * (1.0f / 32767.0f);
  group.sum = group.scale * static_cast<float>(first + second);
  group.start[0] = -zero * first;
  group.start[1] = -zero * second;
}

// Rows begin .. begin + count - 1 of a call's x [rows, in_features] in groups, a row after the other; until this
// thread's next call. A thread rounds them once, however many tasks of these rows it takes one after the other.
STARS_INLINE const Group* rounded_rows(uint64_t call, const float* x, int64_t in_features, int64_t begin,
                                       int64_t count, int zero, bool of_halves) {
  thread_local struct {
    scratch memory;
    uint64_t call = 0;
    int64_t begin, count;
  } kept;
  const int64_t groups = (in_features + kChunk - 1) / kChunk;
  Group* to = kept.memory.take<Group>(count * groups);
  if (kept.call == call && kept.begin == begin && kept.count == count) return to;
  kept.call = call, kept.begin = begin, kept.count = count;
  for (int64_t row = 0; row < count; ++row)
    for (int64_t g = 0; g < groups; ++g)
      round_group(x + (begin + row) * in_features + g * kChunk, in_features - g * kChunk, zero, of_halves,
                  to[row * groups + g]);
  return to;
}

}  // namespace stars::STARS_ISA
