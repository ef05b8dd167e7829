// Memory that a thread keeps from call to call, so that a call in steady state allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "error.h"
#include "simd.h"

namespace stars::STARS_ISA {

// Grows, never shrinks; what was in it is lost when it grows. Aligned to 64 bytes. Throws where there is no memory, and
// is empty then.
class scratch {
 public:
  scratch() = default;
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  STARS_INLINE ~scratch() { std::free(memory); }

  template <class T>
  STARS_INLINE T* take(int64_t count) {
    if ((size_t)count > bytes / sizeof(T)) grow((size_t)count, sizeof(T));
    return static_cast<T*>(memory);
  }

 private:
  void grow(size_t count, size_t size) {
    std::free(memory);
    memory = nullptr;
    bytes = 0;
    size_t wanted;
    if (__builtin_mul_overflow(count, size, &wanted) || wanted > SIZE_MAX / 2) out_of_memory();
    const size_t room = (wanted + wanted / 4 + 4095) / 4096 * 4096;
    memory = std::aligned_alloc(4096, room);
    if (!memory) out_of_memory();
    bytes = room;
  }

  void* memory = nullptr;
  size_t bytes = 0;
};

}  // namespace stars::STARS_ISA
