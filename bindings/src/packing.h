// How a weight matrix [out_features, in_features] is stored for the product: in panels of 32 output columns, each
// [in_features][32] in a row, so that a product reads it as one sequential stream whatever the number of rows. The
// last panel is padded with zeros.
//
// float32: the 32 values of a row of a panel lie in column order.
// bfloat16: columns j and j + 16 are neighbours (2 j and 2 j + 1), so that one load widens to the columns 0 .. 15
// (shifted left by 16 bits) and 16 .. 31 (low half masked off) with one instruction each.
#pragma once

#include <cstdint>

namespace stars {

constexpr int64_t kPanel = 32;
constexpr int64_t kHalfPanel = kPanel / 2;

inline int64_t panel_count(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// Where column `c` of a panel is among the 32 values of a row.
inline int64_t bf16_place(int64_t c) { return c < kHalfPanel ? 2 * c : 2 * (c - kHalfPanel) + 1; }

}  // namespace stars
