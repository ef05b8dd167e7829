// How many CPUs this process may use.
#pragma once

namespace stars {

// More threads than this are never used.
constexpr int kMaxThreads = 256;

// CPUs of the affinity mask, or what the quota allows, rounded up, where that is less; 1 .. kMaxThreads. The
// environment's STARS_USABLE_CPUS is believed instead. `root` stands before the paths that are read, "" but for tests.
int usable_cpus(const char* root);

// The smallest CPU quota of this process's cgroups and of those above them, in CPUs; 0 where there is none.
double cpu_quota(const char* root);

}  // namespace stars
