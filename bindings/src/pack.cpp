// Packing of weights, done once at load.
#include <cstring>

#include "error.h"
#include "packing.h"
#include "parallel.h"
#include "stars.h"

namespace stars {
namespace {

int64_t element_bytes(int32_t dtype) { return dtype == STARS_BF16 ? 2 : 4; }

bool shape_is_valid(int64_t out_features, int64_t in_features, int32_t dtype) {
  return out_features > 0 && in_features > 0 && (dtype == STARS_F32 || dtype == STARS_BF16);
}

// Calls copy(matrix_index, packed_index) for every element, panel by panel.
template <class Copy>
void for_each_element(int64_t out_features, int64_t in_features, bool bf16, Copy&& copy) {
  parallel(panel_count(out_features), [&](int64_t panel) {
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < out_features; ++c) {
      const int64_t from = (panel * kPanel + c) * in_features;
      const int64_t to = panel * kPanel * in_features + (bf16 ? bf16_place(c) : c);
      for (int64_t k = 0; k < in_features; ++k) copy(from + k, to + k * kPanel);
    }
  });
}

template <class T>
void pack(const T* matrix, int64_t out_features, int64_t in_features, T* packed) {
  const int64_t panels = panel_count(out_features), panel_size = kPanel * in_features;
  if (out_features % kPanel) std::memset(packed + (panels - 1) * panel_size, 0, panel_size * sizeof(T));
  for_each_element(out_features, in_features, sizeof(T) == 2, [=](int64_t m, int64_t p) { packed[p] = matrix[m]; });
}

template <class T>
void unpack(const T* packed, int64_t out_features, int64_t in_features, T* matrix) {
  for_each_element(out_features, in_features, sizeof(T) == 2, [=](int64_t m, int64_t p) { matrix[m] = packed[p]; });
}

constexpr const char* kShape = "out_features and in_features must be positive and dtype 0 (float32) or 1 (bfloat16)";

}  // namespace
}  // namespace stars

using namespace stars;

int64_t stars_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype) {
  if (!shape_is_valid(out_features, in_features, dtype)) return 0;
  return panel_count(out_features) * kPanel * in_features * element_bytes(dtype);
}

int32_t stars_pack(const void* matrix, int64_t out_features, int64_t in_features, int32_t dtype, void* packed) {
  if (!shape_is_valid(out_features, in_features, dtype)) return fail("pack", kShape);
  if (!matrix || !packed) return fail("pack", "matrix and packed must not be null");
  if (dtype == STARS_BF16)
    pack(static_cast<const uint16_t*>(matrix), out_features, in_features, static_cast<uint16_t*>(packed));
  else
    pack(static_cast<const uint32_t*>(matrix), out_features, in_features, static_cast<uint32_t*>(packed));
  return STARS_OK;
}

int32_t stars_unpack(const void* packed, int64_t out_features, int64_t in_features, int32_t dtype, void* matrix) {
  if (!shape_is_valid(out_features, in_features, dtype)) return fail("unpack", kShape);
  if (!matrix || !packed) return fail("unpack", "matrix and packed must not be null");
  if (dtype == STARS_BF16)
    unpack(static_cast<const uint16_t*>(packed), out_features, in_features, static_cast<uint16_t*>(matrix));
  else
    unpack(static_cast<const uint32_t*>(packed), out_features, in_features, static_cast<uint32_t*>(matrix));
  return STARS_OK;
}
