// Packing of weights, done once at load.
#include <cstring>
#include <type_traits>

#include "error.h"
#include "packing.h"
#include "parallel.h"
#include "stars.h"

namespace stars {
namespace {

int64_t element_bytes(int32_t dtype) { return dtype == STARS_F32 ? 4 : 2; }

// STARS_OK, or a failure that says what is wrong.
int32_t check_shape(const char* where, int64_t out_features, int64_t in_features, int32_t dtype) {
  if (out_features <= 0 || in_features <= 0) return fail(where, "out_features and in_features must be positive");
  if (dtype < STARS_F32 || dtype > STARS_BF16_DOT) return fail(where, "dtype must be 0 (float32), 1 or 2 (bfloat16)");
  if (!packed_fits(out_features, in_features)) return fail(where, "out_features * in_features is too large");
  return STARS_OK;
}

// Calls copy(matrix_index, packed_index) for every element, panel by panel.
template <int32_t DTYPE, class Copy>
void for_each_element(int64_t out_features, int64_t in_features, Copy&& copy) {
  parallel(panel_count(out_features), [&](int64_t panel) {
    for (int64_t c = 0; c < kPanel && panel * kPanel + c < out_features; ++c) {
      const int64_t from = (panel * kPanel + c) * in_features, to = panel * panel_size(in_features, DTYPE);
      for (int64_t k = 0; k < in_features; ++k) copy(from + k, to + panel_place<DTYPE>(c, k));
    }
  });
}

template <int32_t DTYPE, class T>
void pack(const T* matrix, int64_t out_features, int64_t in_features, T* packed) {
  const int64_t values = panel_count(out_features) * panel_size(in_features, DTYPE);
  if (values != out_features * in_features) std::memset(packed, 0, values * sizeof(T));
  for_each_element<DTYPE>(out_features, in_features, [=](int64_t m, int64_t p) { packed[p] = matrix[m]; });
}

template <int32_t DTYPE, class T>
void unpack(const T* packed, int64_t out_features, int64_t in_features, T* matrix) {
  for_each_element<DTYPE>(out_features, in_features, [=](int64_t m, int64_t p) { matrix[m] = packed[p]; });
}

// Calls f(dtype, bits) with dtype as a constant and `bits` of the type of a value's.
template <class F>
void with_dtype(int32_t dtype, F&& f) {
  if (dtype == STARS_F32)
    f(std::integral_constant<int32_t, STARS_F32>(), uint32_t{});
  else if (dtype == STARS_BF16)
    f(std::integral_constant<int32_t, STARS_BF16>(), uint16_t{});
  else
    f(std::integral_constant<int32_t, STARS_BF16_DOT>(), uint16_t{});
}

}  // namespace
}  // namespace stars

using namespace stars;

int64_t stars_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype) {
  if (check_shape("stars_packed_bytes", out_features, in_features, dtype) != STARS_OK) return 0;
  return panel_count(out_features) * panel_size(in_features, dtype) * element_bytes(dtype);
}

int32_t stars_pack(const void* matrix, int64_t out_features, int64_t in_features, int32_t dtype, void* packed) {
  if (const int32_t wrong = check_shape("pack", out_features, in_features, dtype)) return wrong;
  if (!matrix || !packed) return fail("pack", "matrix and packed must not be null");
  return guarded("pack", [&] {
    with_dtype(dtype, [=](auto kind, auto bits) {
      using T = decltype(bits);
      pack<kind>(static_cast<const T*>(matrix), out_features, in_features, static_cast<T*>(packed));
    });
  });
}

int32_t stars_unpack(const void* packed, int64_t out_features, int64_t in_features, int32_t dtype, void* matrix) {
  if (const int32_t wrong = check_shape("unpack", out_features, in_features, dtype)) return wrong;
  if (!matrix || !packed) return fail("unpack", "matrix and packed must not be null");
  return guarded("unpack", [&] {
    with_dtype(dtype, [=](auto kind, auto bits) {
      using T = decltype(bits);
      unpack<kind>(static_cast<const T*>(packed), out_features, in_features, static_cast<T*>(matrix));
    });
  });
}
