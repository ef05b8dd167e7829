// The matrix product with few rows, where reading the weight is the cost, and with many.
//
// Every element of the result is one chain of fused multiply-adds (or, without them, of products and sums) over
// k = 0 .. in_features - 1 in order, from zero, the bias last. Tiles of any shape and any split over threads keep that
// chain, so the bits of a row depend on nothing but the row and the weight. Breaking the chain at a block of k is
// harmless: a float32 sum stored and loaded is the same sum.
#include <algorithm>
#include <cstring>

#include "ops.h"
#include "packing.h"
#include "parallel.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace stars::STARS_ISA {
namespace {

// A unit is what a tile holds of a panel at a time: one vector of columns of its lower half and one of its upper half.
// kMostRows x 2 accumulators, two vectors of weights and a broadcast value fill the registers.
#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kWidth = 16, kMostRows = 12;
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kWidth = 8, kMostRows = 6;
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr int kWidth = 4, kMostRows = 6;
typedef float Vector __attribute__((vector_size(16)));
inline Vector zero() { return Vector{}; }
inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline Vector broadcast(const float* p) { return Vector{*p, *p, *p, *p}; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

typedef uint32_t Words __attribute__((vector_size(sizeof(Vector))));

constexpr int64_t kUnitsPerPanel = kHalfPanel / kWidth;

// Row k of a unit, given the address of its panel's row k and the first column of the unit.
inline void load_unit(const float* row, int64_t column, Vector& low, Vector& high) {
  low = load(row + column);
  high = load(row + column + kHalfPanel);
}
inline void load_unit(const uint16_t* row, int64_t column, Vector& low, Vector& high) {
  Words both;
  std::memcpy(&both, row + 2 * column, sizeof both);
  low = reinterpret_cast<Vector>(both << 16);
  high = reinterpret_cast<Vector>(both & 0xFFFF0000u);
}

// Rows of x and out that one call works on, over a block of k.
struct Block {
  const float* x;  // at its first row and k
  float* out;      // at its first row, column 0
  const float* bias;
  int64_t x_stride, out_stride;  // in_features, out_features
  int64_t k_begin, k_end;        // of the weight; `out` holds the sums up to k_begin
};

// ROWS rows by UNITS units, from unit `unit` on.
template <int ROWS, int UNITS, class T>
void tile(const Block& b, const T* weight, int64_t unit) {
  Vector sum[ROWS][UNITS][2];
  int64_t column[UNITS];     // first column of the unit in its panel
  const T* panel[UNITS];     // its row k
  float* out[UNITS];         // its columns of row 0; two vectors, kHalfPanel apart
  int64_t columns[UNITS];    // how many of the panel's columns exist
  for (int u = 0; u < UNITS; ++u) {
    const int64_t index = (unit + u) / kUnitsPerPanel;
    column[u] = (unit + u) % kUnitsPerPanel * kWidth;
    panel[u] = weight + (index * b.x_stride + b.k_begin) * kPanel;
    out[u] = b.out + index * kPanel + column[u];
    columns[u] = std::min(b.out_stride - index * kPanel, kPanel) - column[u];
  }
  const auto columns_of_half = [&](int u, int half) { return columns[u] - half * kHalfPanel; };

  for (int r = 0; r < ROWS; ++r) {
    for (int u = 0; u < UNITS; ++u) {
      for (int half = 0; half < 2; ++half) {
        const float* from = out[u] + r * b.out_stride + half * kHalfPanel;
        const int64_t count = columns_of_half(u, half);
        if (b.k_begin == 0) {
          sum[r][u][half] = zero();
        } else if (count >= kWidth) {
          sum[r][u][half] = load(from);
        } else {
          float some[kWidth] = {};
          for (int64_t c = 0; c < count; ++c) some[c] = from[c];
          sum[r][u][half] = load(some);
        }
      }
    }
  }

  const float* x = b.x;
  for (int64_t k = b.k_begin; k < b.k_end; ++k, ++x) {
    Vector low[UNITS], high[UNITS];
    for (int u = 0; u < UNITS; ++u) {
      load_unit(panel[u], column[u], low[u], high[u]);
      panel[u] += kPanel;
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vector value = broadcast(x + r * b.x_stride);
      for (int u = 0; u < UNITS; ++u) {
        sum[r][u][0] = multiply_add(value, low[u], sum[r][u][0]);
        sum[r][u][1] = multiply_add(value, high[u], sum[r][u][1]);
      }
    }
  }

  const bool add_bias = b.bias && b.k_end == b.x_stride;
  for (int u = 0; u < UNITS; ++u) {
    for (int half = 0; half < 2; ++half) {
      const int64_t count = columns_of_half(u, half);
      if (count <= 0) continue;
      float* to = out[u] + half * kHalfPanel;
      Vector bias = zero();
      if (add_bias) {
        float some[kWidth] = {};
        const float* from = b.bias + (to - b.out);
        for (int64_t c = 0; c < std::min<int64_t>(count, kWidth); ++c) some[c] = from[c];
        bias = load(some);
      }
      for (int r = 0; r < ROWS; ++r) {
        const Vector value = add_bias ? add(sum[r][u][half], bias) : sum[r][u][half];
        if (count >= kWidth) {
          store(to + r * b.out_stride, value);
        } else {
          float some[kWidth];
          store(some, value);
          for (int64_t c = 0; c < count; ++c) to[r * b.out_stride + c] = some[c];
        }
      }
    }
  }
}

// All units of a range, as many at once as hide the latency of the sums: with one row, four units keep eight chains.
template <int ROWS, class T>
void row_block(const Block& b, const T* weight, int64_t unit, int64_t end) {
  constexpr int kUnits = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
  for (; unit + kUnits <= end; unit += kUnits) tile<ROWS, kUnits>(b, weight, unit);
  if constexpr (kUnits > 1)
    for (; unit < end; ++unit) tile<ROWS, 1>(b, weight, unit);
}

template <class T, int ROWS = kMostRows>
void row_block(int64_t rows, const Block& b, const T* weight, int64_t unit, int64_t end) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      row_block<ROWS>(b, weight, unit, end);
    else
      row_block<T, ROWS - 1>(rows, b, weight, unit, end);
  }
}

constexpr int64_t kBlockOfK = 256;  // rows of a panel that stay in the first-level cache while row blocks pass over them

// Rows begin .. end - 1 by units first_unit .. last_unit - 1.
template <class T>
void product(const stars_linear_params& p, int64_t begin, int64_t end, int64_t first_unit, int64_t last_unit) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t blocks = (end - begin + kMostRows - 1) / kMostRows;
  const auto block_at = [&](int64_t block) { return begin + (end - begin) * block / blocks; };
  const auto run = [&](int64_t block, int64_t k, int64_t k_end, int64_t unit, int64_t unit_end) {
    const int64_t row = block_at(block);
    const Block b = {p.x + row * p.in_features + k, p.out + row * p.out_features, p.bias,
                     p.in_features, p.out_features, k, k_end};
    row_block(block_at(block + 1) - row, b, weight, unit, unit_end);
  };
  if (blocks == 1) return run(0, 0, p.in_features, first_unit, last_unit);
  for (int64_t unit = first_unit; unit < last_unit; unit += kUnitsPerPanel)
    for (int64_t k = 0; k < p.in_features; k += kBlockOfK)
      for (int64_t block = 0; block < blocks; ++block)
        run(block, k, std::min(k + kBlockOfK, p.in_features), unit, std::min(unit + kUnitsPerPanel, last_unit));
}

}  // namespace

void linear(const stars_linear_params& p) {
  const int64_t panels = panel_count(p.out_features);
  const auto run = p.dtype == STARS_BF16 ? product<uint16_t> : product<float>;
  if (p.rows * p.in_features * panels * kPanel < 32 * 1024)  // a barrier would cost more
    return run(p, 0, p.rows, 0, panels * kUnitsPerPanel);
  const int64_t threads = num_threads();
  const int64_t column_tasks = std::min(panels, 4 * threads);
  const int64_t row_tasks = std::clamp<int64_t>(p.rows / (4 * kMostRows), 1, std::max<int64_t>(4 * threads / panels, 1));
  parallel(column_tasks * row_tasks, [&](int64_t task) {
    const int64_t row_task = task / column_tasks, column_task = task % column_tasks;
    run(p, p.rows * row_task / row_tasks, p.rows * (row_task + 1) / row_tasks,
        panels * column_task / column_tasks * kUnitsPerPanel, panels * (column_task + 1) / column_tasks * kUnitsPerPanel);
  });
}

}  // namespace stars::STARS_ISA
