#include "error.h"

#include <cstdio>
#include <new>

namespace stars {
namespace {

thread_local char last_error[256] = "";
thread_local int32_t last_status = STARS_OK;

}  // namespace

int32_t fail(const char* where, const char* what, int32_t status) {
  std::snprintf(last_error, sizeof last_error, "%s: %s", where, what);
  return last_status = status;
}

int32_t fail_for_memory(const char* where) { return fail(where, "out of memory", STARS_OUT_OF_MEMORY); }

void out_of_memory() { throw std::bad_alloc(); }

}  // namespace stars

const char* stars_last_error(void) { return stars::last_error; }
int32_t stars_last_status(void) { return stars::last_status; }
