// What the fuzzers share: bytes as operations, a count of these, and an end. `make fuzz` builds them with libFuzzer;
// with STARS_FUZZ_MAIN defined they are programs of their own, which run random bytes of a fixed seed:
//
//   fuzz_ledger [operations [seed]]      200000 and 1, where they are not given
//
// With libFuzzer, STARS_FUZZ_OPERATIONS of the environment is how many operations are run. A fuzzer calls stars.h and
// nothing else of the library, and aborts where something that always holds does not.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "stars.h"

#if defined(__SANITIZE_ADDRESS__)
#define STARS_FUZZ_LEAKS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define STARS_FUZZ_LEAKS 1
#endif
#endif
#ifdef STARS_FUZZ_LEAKS
extern "C" int __lsan_do_recoverable_leak_check(void);
#endif

namespace fuzz {

inline int64_t operations = 0, refused = 0, inputs = 0;
inline int64_t most = [] {
  const char* asked = std::getenv("STARS_FUZZ_OPERATIONS");
  return asked ? std::atoll(asked) : INT64_MAX;
}();

[[noreturn]] inline void broken(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: %s does not hold, at operation %lld (%s)\n", file, line, what,
               static_cast<long long>(operations), stars_last_error());
  std::abort();
}
#define HOLDS(condition)                                         \
  do {                                                           \
    if (!(condition)) fuzz::broken(__FILE__, __LINE__, #condition); \
  } while (0)

// Bytes as small numbers; 0 once they are at their end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}
  bool left() const { return next_ != end_; }
  uint8_t byte() { return left() ? *next_++ : 0; }
  int32_t below(int64_t end) { return end > 0 ? static_cast<int32_t>(byte() % end) : 0; }
  bool one_in(int number) { return byte() % number == number - 1; }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
};

// One operation more. At the last one the process ends, well where nothing has leaked.
inline void finish(const char* name) {
  if (operations < most) return;
#ifdef STARS_FUZZ_LEAKS
  const bool leaked = __lsan_do_recoverable_leak_check();
  const char* leaks = leaked ? "MEMORY LEAKED" : "no leak";
#else
  const bool leaked = false;
  const char* leaks = "leaks not looked for";
#endif
  std::printf("%s: %lld operations, %lld of them refused, in %lld inputs: all held, %s\n", name,
              static_cast<long long>(operations), static_cast<long long>(refused), static_cast<long long>(inputs),
              leaks);
  std::fflush(stdout);
  std::_Exit(leaked);
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

#ifdef STARS_FUZZ_MAIN
int main(int count, char** arguments) {
  fuzz::most = count > 1 ? std::atoll(arguments[1]) : 200000;
  std::mt19937_64 random(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
  std::vector<uint8_t> bytes;
  for (;;) {
    bytes.resize(random() % 4000);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
}
#endif
