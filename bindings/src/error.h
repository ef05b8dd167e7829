// The last error of the calling thread.
#pragma once

#include <cstdint>

namespace stars {

// Keeps "where: what" for stars_last_error and returns STARS_INVALID.
int32_t fail(const char* where, const char* what);

}  // namespace stars
