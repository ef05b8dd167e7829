// The arithmetic of attention over one tile of keys: scores, online softmax, weighted values.
//
// Every sum has an order that only key positions and head_dim fix: a score is one chain of vector fmas over head_dim
// and a fixed tree over the lanes, a value one chain over the keys, and how many rows are worked on at once changes
// neither. A key that a row does not see has weight exactly 0.
#pragma once

#include "simd.h"

namespace stars::STARS_ISA {

constexpr int64_t tile_keys = 64;    // tiles start at multiples of this from key 0 of the pages or of the slab
constexpr int64_t split_keys = 512;  // so do the splits, each with a softmax of its own; merged in order
constexpr int64_t key_step = 16;     // no vector is wider

// One tile's keys and values: key j lies `offset[j]` floats after the base.
struct key_tile {
  const float* k;
  const float* v;
  int64_t offset[tile_keys];
  int64_t start;        // position of key 0 of the tile
  int64_t first, last;  // the keys of the tile that some row sees: first <= j < last
};

// Rows of one softmax: `width` floats each, head_dim and zeros up to a multiple of the vector width.
struct softmax_rows {
  float* q;            // scaled
  float* sum;          // [rows, width] weighted values
  float* highest;      // [rows] largest score
  float* denominator;  // [rows]
  float* weights;      // [rows, tile_keys] scores, then weights
  float* decay;        // [rows] what the earlier sums are multiplied by
  float* fresh;        // [rows] scratch
  const int32_t* low;  // [rows] the row sees keys low <= position < high
  const int32_t* high;
  int64_t rows, width, head_dim;
};

// Lane i of the result is the sum over the lanes of v[i], every i in the same order.
STARS_INLINE floats lane_sums(const floats v[vector_width]) {
#if defined(__AVX512F__)
#define STARS_EVEN 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define STARS_ODD 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define STARS_LEFT 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define STARS_RIGHT 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif defined(__AVX2__)
#define STARS_EVEN 0, 8, 1, 9, 4, 12, 5, 13
#define STARS_ODD 2, 10, 3, 11, 6, 14, 7, 15
#define STARS_LEFT 0, 1, 8, 9, 4, 5, 12, 13
#define STARS_RIGHT 2, 3, 10, 11, 6, 7, 14, 15
#else
#define STARS_EVEN 0, 4, 1, 5
#define STARS_ODD 2, 6, 3, 7
#define STARS_LEFT 0, 1, 4, 5
#define STARS_RIGHT 2, 3, 6, 7
#endif
  floats pairs[vector_width / 2], fours[vector_width / 4];
#pragma GCC unroll 8
  for (int i = 0; i < vector_width / 2; ++i)
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], STARS_EVEN) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], STARS_ODD);
#pragma GCC unroll 4
  for (int i = 0; i < vector_width / 4; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], STARS_LEFT) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], STARS_RIGHT);
#if defined(__AVX512F__)
#define STARS_FRONT 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define STARS_BACK 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
  const floats a = __builtin_shufflevector(fours[0], fours[1], STARS_FRONT) +
                   __builtin_shufflevector(fours[0], fours[1], STARS_BACK);
  const floats b = __builtin_shufflevector(fours[2], fours[3], STARS_FRONT) +
                   __builtin_shufflevector(fours[2], fours[3], STARS_BACK);
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return fours[0];
#endif
}

// Scores of `Rows` rows against vector_width / Rows keys.
template <int Rows>
STARS_INLINE void score_block(const softmax_rows& s, int64_t row, const key_tile& tile, int64_t key) {
  constexpr int keys = vector_width / Rows;
  const float* q = s.q + row * s.width;
  const int64_t whole = s.head_dim / vector_width * vector_width;
  floats sums[vector_width] = {};
  for (int64_t d = 0; d < whole; d += vector_width) {
    floats own[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) own[r] = load(q + r * s.width + d);
#pragma GCC unroll 16
    for (int j = 0; j < keys; ++j) {
      const floats k = load(tile.k + tile.offset[key + j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) sums[r * keys + j] = fma(own[r], k, sums[r * keys + j]);
    }
  }
  if (whole < s.head_dim) {
#pragma GCC unroll 16
    for (int j = 0; j < keys; ++j) {
      const floats k = load_first(tile.k + tile.offset[key + j] + whole, s.head_dim - whole);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        sums[r * keys + j] = fma(load(q + r * s.width + whole), k, sums[r * keys + j]);
    }
  }
  const floats scores = lane_sums(sums);
  float* out = s.weights + row * tile_keys + key;
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
    std::memcpy(out + r * tile_keys, reinterpret_cast<const float*>(&scores) + r * keys, sizeof(float) * keys);
}

STARS_INLINE void ask_for(const float* row, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 16) __builtin_prefetch(row + d, 0, 2);
}

// Keys in the outer loop: the queries stay in the nearest cache. Those of the next step, and the values of this one, are
// asked for: after a step's weights went through the caches they lie far away.
template <int Rows>
STARS_INLINE void score_rows(const softmax_rows& s, int64_t first, int64_t last, const key_tile& tile, int64_t begin,
                             int64_t end, bool ask) {
  constexpr int keys = vector_width / Rows;
  if (first == last) return;
  for (int64_t key = begin; key < end; key += keys) {
    if (ask) {
      for (int64_t j = key; j < key + keys; ++j) {
        if (j + key_step < end) ask_for(tile.k + tile.offset[j + key_step], s.head_dim);
        ask_for(tile.v + tile.offset[j], s.head_dim);
      }
    }
    for (int64_t row = first; row < last; row += Rows) score_block<Rows>(s, row, tile, key);
  }
}

// sum = sum * decay + weights @ values, for `Rows` rows and `Vectors` vectors of the head from `d` on.
template <int Rows, int Vectors, bool Partial>
STARS_INLINE void value_block(const softmax_rows& s, int64_t row, const key_tile& tile, int64_t d) {
  float* out = s.sum + row * s.width + d;
  const float* weights = s.weights + row * tile_keys;
  const float* v = tile.v + d;
  floats sums[Rows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i)
      sums[r][i] = load(out + r * s.width + i * vector_width) * splat(s.decay[row + r]);
  for (int64_t j = tile.first; j < tile.last; ++j) {
    floats own[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const float* from = v + tile.offset[j] + i * vector_width;
      own[i] = Partial ? load_first(from, s.head_dim - d) : load(from);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const floats weight = splat(weights[r * tile_keys + j]);
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) sums[r][i] = fma(weight, own[i], sums[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) store(out + r * s.width + i * vector_width, sums[r][i]);
}

template <int Rows>
STARS_INLINE void value_rows(const softmax_rows& s, int64_t row, const key_tile& tile) {
  constexpr int most = vector_width == 16 ? 4 : 2;  // as many as the registers hold
  int64_t d = 0;
  for (; d + most * vector_width <= s.head_dim; d += most * vector_width)
    value_block<Rows, most, false>(s, row, tile, d);
  for (; d + vector_width <= s.head_dim; d += vector_width) value_block<Rows, 1, false>(s, row, tile, d);
  if (d < s.head_dim) value_block<Rows, 1, true>(s, row, tile, d);
}

// From scores to weights: softcap, mask, largest score, exponentials; fills decay.
STARS_INLINE void softmax_tile(const softmax_rows& s, const key_tile& tile, int64_t begin, int64_t end, float softcap) {
  const floats minus_infinity = splat(-__builtin_inff());
  for (int64_t row = 0; row < s.rows; ++row) {
    float* weights = s.weights + row * tile_keys;
    const bool sees_all = s.low[row] <= tile.start + begin && s.high[row] >= tile.start + end;
    const ints low = splat((int32_t)(s.low[row] - tile.start)), high = splat((int32_t)(s.high[row] - tile.start));
    floats highest = minus_infinity;
    for (int64_t j = begin; j < end; j += vector_width) {
      floats score = load(weights + j);
      if (softcap > 0.0f) score = splat(softcap) * tanh(score / splat(softcap));
      if (!sees_all) {
        const ints key = lane_numbers() + (int32_t)j;
        score = (key >= low) & (key < high) ? score : minus_infinity;
      }
      if (softcap > 0.0f || !sees_all) store(weights + j, score);
      highest = max(highest, score);
    }
    const float own = max_of(highest);
    s.fresh[row] = own > s.highest[row] ? own : s.highest[row];
  }
  for (int64_t row = 0; row < s.rows; row += vector_width) {
    const floats before = load(s.highest + row), now = load(s.fresh + row);
    store(s.decay + row, before == now ? splat(1.0f) : exp(before - now));  // equal also where nothing was seen yet
    store(s.highest + row, now);
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    float* weights = s.weights + row * tile_keys;
    const bool nothing = s.highest[row] == -__builtin_inff();
    const floats highest = splat(nothing ? 0.0f : s.highest[row]);
    floats total = {};
    for (int64_t j = begin; j < end; j += vector_width) {
      const floats weight = exp(load(weights + j) - highest);
      store(weights + j, weight);
      total += weight;
    }
    s.fresh[row] = sum_of(total);
  }
  for (int64_t row = 0; row < s.rows; row += vector_width)
    store(s.denominator + row, fma(load(s.denominator + row), load(s.decay + row), load(s.fresh + row)));
}

// Offsets of keys around first .. last - 1 that fill a step: any of these keys will do, for they are masked.
inline void pad_offsets(key_tile& tile) {
  for (int64_t j = tile.first; j % key_step != 0; --j) tile.offset[j - 1] = tile.offset[tile.first];
  for (int64_t j = tile.last; j % key_step != 0; ++j) tile.offset[j] = tile.offset[tile.last - 1];
}

// Adds one tile, with offsets for first .. last - 1, to the rows' softmax.
inline void add_tile(const softmax_rows& s, key_tile& tile, float softcap) {
  pad_offsets(tile);
  const int64_t begin = tile.first / key_step * key_step, end = (tile.last + key_step - 1) / key_step * key_step;
  const int64_t fours = s.rows / 4 * 4, twos = s.rows / 2 * 2;
  score_rows<4>(s, 0, fours, tile, begin, end, true);
  score_rows<2>(s, fours, twos, tile, begin, end, fours == 0);
  score_rows<1>(s, twos, s.rows, tile, begin, end, twos == 0);
  softmax_tile(s, tile, begin, end, softcap);
  for (int64_t row = 0; row < fours; row += 4) value_rows<4>(s, row, tile);
  for (int64_t row = fours; row < twos; row += 2) value_rows<2>(s, row, tile);
  if (twos < s.rows) value_rows<1>(s, twos, tile);
}

}  // namespace stars::STARS_ISA
