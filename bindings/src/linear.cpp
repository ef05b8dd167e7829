// The matrix product with few rows, where reading the weight is the cost, and with many.
//
// The types of a cell of the weight and of a cell of x say what is multiplied:
//   float, float          STARS_F32
//   uint16_t, float       STARS_BF16, widened to float32 in registers
//   uint32_t, float       STARS_BF16_DOT, pairs of values widened likewise: without the instruction for such pairs
//   uint32_t, uint32_t    STARS_BF16_DOT, pairs of values times pairs of values of x, which is rounded for that
//
// Every element of the result is one chain of fused multiply-adds (or, without them, of products and sums) over
// k = 0 .. in_features - 1 in order, from zero, the bias last. Tiles of any shape and any split over threads keep that
// chain, so the bits of a row depend on nothing but the row and the weight. Breaking the chain at a block of k is
// harmless: a float32 sum stored and loaded is the same sum. (Of a pair of products the instruction adds one after the
// other, in an order of its own, always the same.)
#include <algorithm>
#include <type_traits>

#include "ops.h"
#include "packing.h"
#include "product_tasks.h"
#include "scratch.h"
#include "simd.h"

namespace stars::STARS_ISA {
namespace {

// A unit is what a tile holds of a panel at a time: one vector of columns of its lower half and one of its upper half.
constexpr int64_t kUnitsPerPanel = kHalfPanel / vector_width;
// Rows of a tile; inputs of a panel that many row blocks pass over at a time; rows that do, whose x stays in the second-
// level cache. With 16 registers, 6 x 2 sums, two vectors of weights and a value of x fill them. With 32, it is what was
// fastest where each instruction set was measured: a Zen 4 and an Emerald Rapids (benchmarks/README.md).
#if defined(__AVX512BF16__)
constexpr int kMaxRows = 8;
constexpr int64_t kBlockOfK = 256, kRowsPerPass = 64;
#elif defined(__AVX512F__)
constexpr int kMaxRows = 14;
constexpr int64_t kBlockOfK = 768, kRowsPerPass = 112;
#else
constexpr int kMaxRows = 6;
constexpr int64_t kBlockOfK = 256, kRowsPerPass = 48;
#endif

// Rows of a panel that are asked for before they are needed: the processor's own prefetching stops at every page, and
// begins anew at every panel.
constexpr int64_t kRowsAhead = 32;

template <class T>
STARS_INLINE void ask_for(const T* row) {
  for (int64_t i = 0; i < kPanel; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Inputs of a cell.
template <class Cell>
constexpr int64_t kInputs = std::is_same_v<Cell, uint32_t> ? 2 : 1;

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
STARS_INLINE void load_unit(const uint32_t* row, int64_t column, words& low, words& high) {
  low = bits_as<words>(load(reinterpret_cast<const float*>(row + column)));
  high = bits_as<words>(load(reinterpret_cast<const float*>(row + column + kHalfPanel)));
}

STARS_INLINE void load_first_of_pairs(const uint32_t* row, int64_t column, floats& low, floats& high) {
  words both_low, both_high;
  load_unit(row, column, both_low, both_high);
  low = bits_as<floats>(both_low << 16);
  high = bits_as<floats>(both_high << 16);
}
STARS_INLINE void load_second_of_pairs(const uint32_t* row, int64_t column, floats& low, floats& high) {
  asm("" : "+r"(row));  // loads again: the pairs would take registers that the sums need
  words both_low, both_high;
  load_unit(row, column, both_low, both_high);
  low = bits_as<floats>(both_low & 0xFFFF0000u);
  high = bits_as<floats>(both_high & 0xFFFF0000u);
}

STARS_INLINE floats add_product(floats a, floats b, floats sum) { return fma(a, b, sum); }
#ifdef __AVX512BF16__
// Of both values of a and b, each product added with one rounding.
STARS_INLINE floats add_product(words a, words b, floats sum) {
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// Those of one cell of each row of x.
template <int ROWS, int UNITS, class Vector, class X>
STARS_INLINE void add_products(floats (&sum)[ROWS][UNITS][2], const X* x, int64_t x_stride,
                               const Vector (&low)[UNITS], const Vector (&high)[UNITS]) {
  for (int r = 0; r < ROWS; ++r) {
    const Vector value = splat(x[r * x_stride]);
    for (int u = 0; u < UNITS; ++u) {
      sum[r][u][0] = add_product(value, low[u], sum[r][u][0]);
      sum[r][u][1] = add_product(value, high[u], sum[r][u][1]);
    }
  }
}

// Rows of x and out that one call works on, over a block of k.
template <class X>
struct Block {
  const X* x;  // at its first row and k
  float* out;  // at its first row, the weight's column 0
  const float* bias;
  int64_t in_features, out_features, x_stride, out_stride;
  int64_t k_begin, k_end;  // of the weight; `out` holds the sums up to k_begin
};

// ROWS rows by UNITS units, from unit `unit` on.
template <int ROWS, int UNITS, class T, class X>
void tile(const Block<X>& b, const T* weight, int64_t unit) {
  floats sum[ROWS][UNITS][2];
  const T* panel[UNITS];      // row k of the unit's panel
  int64_t column[UNITS];      // the unit's first column in it
  int64_t place[UNITS][2];    // and those of its halves in `out`
  int64_t columns[UNITS][2];  // how many of them exist
  const int64_t depth = panel_depth(b.in_features, kInputs<T> == 2);
  for (int u = 0; u < UNITS; ++u) {
    const int64_t index = (unit + u) / kUnitsPerPanel;
    panel[u] = weight + (index * depth + b.k_begin / kInputs<T>) * kPanel;
    column[u] = (unit + u) % kUnitsPerPanel * vector_width;
    for (int half = 0; half < 2; ++half) {
      place[u][half] = index * kPanel + column[u] + half * kHalfPanel;
      columns[u][half] = std::clamp<int64_t>(b.out_features - place[u][half], 0, vector_width);
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

  const X* x = b.x;
  int64_t k = b.k_begin;
  // Behind the end of these panels lie the next ones.
  constexpr int64_t kPanels = UNITS > kUnitsPerPanel ? UNITS / kUnitsPerPanel : 1;
  const auto ahead = [&](int64_t k) {
    return (k + kRowsAhead * kInputs<T> < b.k_end ? kRowsAhead : kRowsAhead + (kPanels - 1) * depth) * kPanel;
  };
  if constexpr (kInputs<T> == kInputs<X>) {
    for (; k < b.k_end; k += kInputs<T>, ++x) {
      std::conditional_t<kInputs<T> == 2, words, floats> low[UNITS], high[UNITS];
      for (int u = 0; u < UNITS; ++u) {
        load_unit(panel[u], column[u], low[u], high[u]);
        ask_for(panel[u] + ahead(k));
        panel[u] += kPanel;
      }
      add_products(sum, x, b.x_stride, low, high);
    }
  } else {
    floats low[UNITS], high[UNITS];
    for (; k + 1 < b.k_end; k += 2, x += 2) {
      for (int u = 0; u < UNITS; ++u) load_first_of_pairs(panel[u], column[u], low[u], high[u]);
      add_products(sum, x, b.x_stride, low, high);
      for (int u = 0; u < UNITS; ++u) {
        load_second_of_pairs(panel[u], column[u], low[u], high[u]);
        ask_for(panel[u] + ahead(k));
        panel[u] += kPanel;
      }
      add_products(sum, x + 1, b.x_stride, low, high);
    }
    if (k < b.k_end) {
      for (int u = 0; u < UNITS; ++u) load_first_of_pairs(panel[u], column[u], low[u], high[u]);
      add_products(sum, x, b.x_stride, low, high);
    }
  }

  const bool add_bias = b.bias && b.k_end == b.in_features;
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
template <int ROWS, class T, class X>
void row_block(const Block<X>& b, const T* weight, int64_t unit, int64_t end) {
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

template <class T, int ROWS = kMaxRows, class X>
void row_block(int64_t rows, const Block<X>& b, const T* weight, int64_t unit, int64_t end) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      row_block<ROWS>(b, weight, unit, end);
    else
      row_block<T, ROWS - 1>(rows, b, weight, unit, end);
  }
}

// `rows` rows of x in the cells they are multiplied in.
template <class X>
const X* cells_of(const float* x, int64_t, int64_t) {
  return x;
}

#ifdef __AVX512BF16__
// In pairs, rounded to nearest even, an odd last value with a zero. They stay until this thread's next call.
template <>
const uint32_t* cells_of(const float* x, int64_t rows, int64_t in_features) {
  thread_local scratch memory;
  const int64_t depth = panel_depth(in_features, true);
  uint32_t* pairs = memory.take<uint32_t>(rows * depth);
  for (int64_t row = 0; row < rows; ++row, x += in_features) {
    for (int64_t k = 0; k < in_features; k += 2 * vector_width) {
      const int64_t count = std::min<int64_t>(in_features - k, 2 * vector_width);
      const int64_t in_low = std::min<int64_t>(count, vector_width);
      const floats low = load_first(x + k, in_low), high = load_first(x + k + in_low, count - in_low);
      const floats both = (floats)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      store_first(reinterpret_cast<float*>(pairs + row * depth + k / 2), both, (count + 1) / 2);
    }
  }
  return pairs;
}
#endif

// Rows begin .. end - 1, at most kRowsPerPass, by units first_unit .. last_unit - 1.
template <class T, class X>
void pass(const stars_linear_params& p, int64_t begin, int64_t end, int64_t first_unit, int64_t last_unit) {
  const T* weight = static_cast<const T*>(p.weight);
  // Rounded again for each range of columns: with few rows a microsecond, as much as a barrier after doing it once.
  const X* x = cells_of<X>(p.x + begin * p.in_features, end - begin, p.in_features);
  const int64_t x_stride = panel_depth(p.in_features, kInputs<X> == 2);
  const int64_t blocks = (end - begin + kMaxRows - 1) / kMaxRows;
  const auto block_at = [&](int64_t block) { return begin + (end - begin) * block / blocks; };
  const auto run = [&](int64_t block, int64_t k, int64_t k_end, int64_t unit, int64_t unit_end) {
    const int64_t row = block_at(block);
    const Block<X> b = {x + (row - begin) * x_stride + k / kInputs<X>, p.out + row * p.out_stride + p.out_column,
                        p.bias, p.in_features, p.out_features, x_stride, p.out_stride, k, k_end};
    row_block(block_at(block + 1) - row, b, weight, unit, unit_end);
  };
  if (blocks == 1) return run(0, 0, p.in_features, first_unit, last_unit);
  for (int64_t unit = first_unit; unit < last_unit; unit += kUnitsPerPanel)
    for (int64_t k = 0; k < p.in_features; k += kBlockOfK)
      for (int64_t block = 0; block < blocks; ++block)
        run(block, k, std::min(k + kBlockOfK, p.in_features), unit, std::min(unit + kUnitsPerPanel, last_unit));
}

// The same, of any number of rows, by panels first .. last - 1.
template <class T, class X>
void product(const stars_linear_params& p, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t rows = end - begin, passes = (rows + kRowsPerPass - 1) / kRowsPerPass;
  for (int64_t i = 0; i < passes; ++i)
    pass<T, X>(p, begin + rows * i / passes, begin + rows * (i + 1) / passes, first * kUnitsPerPanel,
               last * kUnitsPerPanel);
}

}  // namespace

void linear(const stars_linear_params& p) {
#ifdef __AVX512BF16__
  using XOfPairs = uint32_t;
#else
  using XOfPairs = float;
#endif
  const auto run = p.dtype == STARS_F32    ? product<float, float>
                   : p.dtype == STARS_BF16 ? product<uint16_t, float>
                                           : product<uint32_t, XOfPairs>;
  for_product_tasks(p, kRowsPerPass, kMaxRows, run);
}

}  // namespace stars::STARS_ISA
