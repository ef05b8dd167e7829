// Memory that a thread keeps from call to call, so that a call in steady state allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace stars::STARS_ISA {

// Grows, never shrinks; what was in it is lost when it grows. Aligned to 64 bytes.
class scratch {
 public:
  scratch() = default;
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  STARS_INLINE ~scratch() { std::free(memory); }

  template <class T>
  STARS_INLINE T* take(int64_t count) {
    const size_t wanted = (size_t)count * sizeof(T);
    if (wanted > bytes) {
      std::free(memory);
      bytes = (wanted + wanted / 4 + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(4096, bytes);
      if (!memory) std::abort();
    }
    return static_cast<T*>(memory);
  }

 private:
  void* memory = nullptr;
  size_t bytes = 0;
};

}  // namespace stars::STARS_ISA
