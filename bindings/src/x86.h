// What this x86 CPU can do, as far as the system saves the registers that it takes.
//
// Asked of the CPU itself: what __builtin_cpu_supports says comes from a library of the compiler's, and zig's, which
// wheels are built with, says no to everything.
#pragma once

#include <cpuid.h>

#include <cstdint>
#include <initializer_list>

namespace stars {

struct x86_features {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW, DQ and VL
  bool vnni = false;
  bool bf16 = false;
};

inline x86_features features_of_cpu() {
  struct registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
  };
  const auto ask = [](uint32_t leaf, uint32_t subleaf) {
    registers r;  // zeros where the CPU has no such leaf
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
  };
  const auto has = [](uint32_t bits, std::initializer_list<int> wanted) {
    for (const int bit : wanted)
      if (!(bits >> bit & 1)) return false;
    return true;
  };
  x86_features found;
  const registers basic = ask(1, 0);
  if (!has(basic.c, {27})) return found;  // XGETBV, which tells what the system saves, may be used
  uint32_t saved, high;
  asm("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const registers more = ask(7, 0);
  found.avx2 = has(saved, {1, 2}) && has(basic.c, {12, 28, 29}) && has(more.b, {5});
  found.avx512 = found.avx2 && has(saved, {5, 6, 7}) && has(more.b, {16, 17, 30, 31});
  found.vnni = found.avx512 && has(more.c, {11});
  found.bf16 = found.vnni && more.a >= 1 && has(ask(7, 1).a, {5});
  return found;
}

}  // namespace stars
