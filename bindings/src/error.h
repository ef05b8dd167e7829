// What goes wrong: statuses for the C interface, and the last error of the calling thread.
#pragma once

#include <cstdint>
#include <exception>

#include "stars.h"

namespace stars {

// Keeps "where: what" for stars_last_error and returns the status.
int32_t fail(const char* where, const char* what, int32_t status = STARS_INVALID);

// The same for STARS_OUT_OF_MEMORY.
int32_t fail_for_memory(const char* where);

// Throws std::bad_alloc. Sources compiled per instruction set call it, and leave the making of exceptions to one that
// is compiled once.
[[noreturn]] void out_of_memory();

// f() for a caller on the other side of the C interface: whatever is thrown is a status. Only what lacks memory throws
// here (a std::bad_alloc, or the length_error of a size that no memory could hold).
template <class F>
int32_t guarded(const char* where, F&& f) {
  try {
    f();
    return STARS_OK;
  } catch (const std::exception&) {
    return fail_for_memory(where);
  }
}

}  // namespace stars
