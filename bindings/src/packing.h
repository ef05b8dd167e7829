// How a weight matrix [out_features, in_features] is stored for the product: in panels of 32 output columns, each
// [in_features][32] in a row, so that a product reads it as one sequential stream whatever the number of rows. The
// last panel is padded with zeros.
//
// STARS_F32: the 32 values of a row of a panel lie in column order.
// STARS_BF16: columns j and j + 16 are neighbours (2 j and 2 j + 1), so that one load widens to the columns 0 .. 15
// (shifted left by 16 bits) and 16 .. 31 (low half masked off) with one instruction each.
// STARS_BF16_DOT: rows 2 k and 2 k + 1 are one row of 32 pairs in column order, as the dot product of pairs reads them;
// the pair of an odd last row is filled up with zeros. Widened as above, a load gives row 2 k and then row 2 k + 1.
#pragma once

#include <cstdint>

#include "sizes.h"
#include "stars.h"

namespace stars {

constexpr int64_t kPanel = 32;
constexpr int64_t kHalfPanel = kPanel / 2;

inline int64_t panel_count(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// Rows of a panel, of pairs where `pairs`.
inline int64_t panel_depth(int64_t in_features, bool pairs) { return pairs ? (in_features + 1) / 2 : in_features; }

// Values of a panel.
inline int64_t panel_size(int64_t in_features, int32_t dtype) {
  return kPanel * (dtype == STARS_BF16_DOT ? 2 * panel_depth(in_features, true) : in_features);
}

// Whether the matrix, and the packed form of it in any dtype, can be arrays.
inline bool packed_fits(int64_t out_features, int64_t in_features) {
  return fits(out_features, in_features) && fits(panel_count(out_features), kPanel, in_features + 1);
}

// Where the value of column `c` of a panel at input `k` is among them.
template <int32_t DTYPE>
inline int64_t panel_place(int64_t c, int64_t k) {
  if (DTYPE == STARS_BF16_DOT) return k / 2 * 2 * kPanel + 2 * c + k % 2;
  if (DTYPE == STARS_BF16) c = c < kHalfPanel ? 2 * c : 2 * (c - kHalfPanel) + 1;
  return k * kPanel + c;
}

}  // namespace stars
