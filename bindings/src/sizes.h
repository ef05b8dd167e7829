// Which sizes an array can have. They are checked where the C interface is entered, so that nothing past it
// overflows.
#pragma once

#include <cstdint>

namespace stars {

// Elements of an array: 2^48 bytes of float32, as many as a process can address. The small factors that operations
// multiply sizes with (at most 2^17 together) stay within int64 on top of it.
constexpr int64_t kMaxElements = int64_t{1} << 46;

// Whether each size, and an array of their product, can be.
template <class... Sizes>
bool fits(Sizes... sizes) {
  int64_t product = 1;
  const auto takes = [&](int64_t size) {
    return size >= 0 && size <= kMaxElements && !__builtin_mul_overflow(product, size, &product) &&
           product <= kMaxElements;
  };
  return (takes(sizes) && ...);
}

}  // namespace stars
