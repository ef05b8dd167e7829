// The matrix product with few rows, where reading the weight is the cost, and with many.
//
// Every element of the result is one chain of fused multiply-adds (or, without them, of products and sums) over
// k = 0 .. in_features - 1 in order, from zero, the bias last. Tiles of any shape and any split over threads keep that
// chain, so the bits of a row depend on nothing but the row and the weight. Breaking the chain at a block of k is
// harmless: a float32 sum stored and loaded is the same sum.
#include <algorithm>

#include "ops.h"
#include "packing.h"
#include "parallel.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

// A unit is what a tile holds of a panel at a time: one vector of columns of its lower half and one of its upper half.
constexpr int64_t kUnitsPerPanel = kHalfPanel / vector_width;
// Rows of a tile. With 16 registers, 6 x 2 sums, two vectors of weights and a value of x fill them. With 32, 8 rows
// reached 112 GFLOP/s a core where 12 reached 108 and 14 100 (Zen 4, peak 118).
constexpr int kMostRows = vector_width == 16 ? 8 : 6;

// Row k of a unit, given the address of its panel's row k and the first column of the unit.
STARS_INLINE void load_unit(const float* row, int64_t column, floats& low, floats& high) {
  low = load(row + column);
  high = load(row + column + kHalfPanel);
}
STARS_INLINE void load_unit(const uint16_t* row, int64_t column, floats& low, floats& high) {
  const words both = bits_as<words>(load(reinterpret_cast<const float*>(row + 2 * column)));
  low = bits_as<floats>(both << 16);
  high = bits_as<floats>(both & 0xFFFF0000u);
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
  floats sum[ROWS][UNITS][2];
  const T* panel[UNITS];      // row k of the unit's panel
  int64_t column[UNITS];      // the unit's first column in it
  int64_t place[UNITS][2];    // and those of its halves in `out`
  int64_t columns[UNITS][2];  // how many of them exist
  for (int u = 0; u < UNITS; ++u) {
    const int64_t index = (unit + u) / kUnitsPerPanel;
    panel[u] = weight + (index * b.x_stride + b.k_begin) * kPanel;
    column[u] = (unit + u) % kUnitsPerPanel * vector_width;
    for (int half = 0; half < 2; ++half) {
      place[u][half] = index * kPanel + column[u] + half * kHalfPanel;
      columns[u][half] = std::clamp<int64_t>(b.out_stride - place[u][half], 0, vector_width);
    }
  }

  for (int r = 0; r < ROWS; ++r) {
    for (int u = 0; u < UNITS; ++u) {
      for (int half = 0; half < 2; ++half) {
        const float* from = b.out + r * b.out_stride + place[u][half];
        sum[r][u][half] = b.k_begin == 0 ? floats{} : load_first(from, columns[u][half]);
        __builtin_prefetch(from, 1);  // the result's lines arrive while the sums are formed: 94 to 103 GFLOP/s
      }
    }
  }

  const float* x = b.x;
  for (int64_t k = b.k_begin; k < b.k_end; ++k, ++x) {
    floats low[UNITS], high[UNITS];
    for (int u = 0; u < UNITS; ++u) {
      load_unit(panel[u], column[u], low[u], high[u]);
      panel[u] += kPanel;
    }
    for (int r = 0; r < ROWS; ++r) {
      const floats value = splat(x[r * b.x_stride]);
      for (int u = 0; u < UNITS; ++u) {
        sum[r][u][0] = fma(value, low[u], sum[r][u][0]);
        sum[r][u][1] = fma(value, high[u], sum[r][u][1]);
      }
    }
  }

  const bool add_bias = b.bias && b.k_end == b.x_stride;
  for (int u = 0; u < UNITS; ++u) {
    for (int half = 0; half < 2; ++half) {
      const int64_t count = columns[u][half];
      if (count == 0) continue;
      const floats bias = add_bias ? load_first(b.bias + place[u][half], count) : floats{};
      for (int r = 0; r < ROWS; ++r) {
        const floats value = add_bias ? sum[r][u][half] + bias : sum[r][u][half];
        store_first(b.out + r * b.out_stride + place[u][half], value, count);
      }
    }
  }
}

// All units of a range, several at once with few rows: eight chains of sums hide the latency of the multiply-adds.
template <int ROWS, class T>
void row_block(const Block& b, const T* weight, int64_t unit, int64_t end) {
  constexpr bool kManyRegisters = vector_width == 16;
  constexpr int kUnits = ROWS == 1                     ? 4
                         : ROWS == 2                   ? (kManyRegisters ? 4 : 2)
                         : ROWS == 3 && sizeof(T) == 4 ? 2
                         : ROWS <= 4 && kManyRegisters ? 2
                                                       : 1;
  for (; unit + kUnits <= end; unit += kUnits) tile<ROWS, kUnits>(b, weight, unit);
  if constexpr (kUnits > 2)
    for (; unit + 2 <= end; unit += 2) tile<ROWS, 2>(b, weight, unit);
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

constexpr int64_t kBlockOfK = 256;  // of a panel; stays in the first-level cache while row blocks pass over it
constexpr int64_t kRowsPerPass = 8 * kMostRows;  // whose x stays in the second, and whose pages in the first TLB

// Rows begin .. end - 1, at most kRowsPerPass, by units first_unit .. last_unit - 1.
template <class T>
void pass(const stars_linear_params& p, int64_t begin, int64_t end, int64_t first_unit, int64_t last_unit) {
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

// The same, of any number of rows.
template <class T>
void product(const stars_linear_params& p, int64_t begin, int64_t end, int64_t first_unit, int64_t last_unit) {
  const int64_t rows = end - begin, passes = (rows + kRowsPerPass - 1) / kRowsPerPass;
  for (int64_t i = 0; i < passes; ++i)
    pass<T>(p, begin + rows * i / passes, begin + rows * (i + 1) / passes, first_unit, last_unit);
}

}  // namespace

void linear(const stars_linear_params& p) {
  const auto run = p.dtype == STARS_BF16 ? product<uint16_t> : product<float>;
  // A task is worth its barrier from about a microsecond on. More tasks than threads, so that a thread that is held up
  // leaves work to the others.
  constexpr int64_t kLeastTask = 32 * 1024;  // multiply-adds
  const int64_t panels = panel_count(p.out_features), threads = num_threads();
  const int64_t worth = p.rows * p.in_features * panels * kPanel / kLeastTask;
  const int64_t tasks = std::clamp<int64_t>(worth / threads, 1, 4) * threads;
  if (worth < 2 || threads == 1) return run(p, 0, p.rows, 0, panels * kUnitsPerPanel);
  const int64_t column_tasks = std::min((panels + 1) / 2, tasks);
  const int64_t row_tasks = std::clamp<int64_t>(tasks / column_tasks, 1, std::max<int64_t>(p.rows / kMostRows, 1));
  const auto first_unit = [=](int64_t task) {  // of a pair of panels
    return std::min((panels + 1) / 2 * task / column_tasks * 2, panels) * kUnitsPerPanel;
  };
  parallel(column_tasks * row_tasks, [&](int64_t task) {
    const int64_t row_task = task % row_tasks, column_task = task / row_tasks;
    run(p, p.rows * row_task / row_tasks, p.rows * (row_task + 1) / row_tasks, first_unit(column_task),
        first_unit(column_task + 1));
  });
}

}  // namespace stars::STARS_ISA
