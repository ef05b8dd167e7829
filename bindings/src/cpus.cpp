// The CPUs of the affinity mask and of a container's quota.
//
// A quota is rounded up, as Go's and Java's runtimes do: with 1.5 CPUs, two threads get through half as much again as
// one, though they stand still for a quarter of the time. More threads than that only use the quota up sooner.
#include "cpus.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace stars {
namespace {

int affinity_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = std::min(std::max(count, 1), CPU_COUNT(&set));
#endif
  return std::clamp(count, 1, kMostThreads);
}

// One mounted cgroup hierarchy that can limit CPU time.
struct Mount {
  bool v2;
  std::string root;   // the cgroup that lies at `point`
  std::string point;
};

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

bool contains(const std::vector<std::string>& list, const char* item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// Spaces, tabs, newlines and backslashes stand as \ and three octal digits in mountinfo.
std::string unescaped(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto octal = [&](size_t at) { return at < text.size() && text[at] >= '0' && text[at] <= '7'; };
    if (text[i] == '\\' && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      plain += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// Lines such as "36 35 98:0 /docker/4f2 /sys/fs/cgroup rw,relatime shared:1 - cgroup2 cgroup rw": see proc(5).
std::vector<Mount> cgroup_mounts(const std::string& root) {
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> fields = split(line, ' ');
    const auto dash = std::find(fields.begin(), fields.end(), "-");
    if (dash - fields.begin() < 6 || fields.end() - dash < 4) continue;
    const bool v2 = dash[1] == "cgroup2";
    if (v2 || (dash[1] == "cgroup" && contains(split(dash[3], ','), "cpu")))
      mounts.push_back({v2, unescaped(fields[3]), unescaped(fields[4])});
  }
  return mounts;
}

// In CPUs; 0 where the files of this cgroup name none.
double quota_of(const std::string& folder, bool v2) {
  double quota = -1.0, period = 100000.0;
  if (v2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;  // "max 100000" reads as no number
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1: none
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0.0 && period > 0.0 ? quota / period : 0.0;
}

double smaller(double quota, double other) { return quota > 0.0 && (other <= 0.0 || quota < other) ? quota : other; }

// Where cgroup `path` lies below the mount, "" where it is the mount itself or lies outside of it, as seen from some
// namespaces.
std::string below(const Mount& mount, const std::string& path) {
  const std::string root = mount.root == "/" ? "" : mount.root;
  if (path.compare(0, root.size(), root) != 0) return "";
  const std::string rest = path.substr(root.size());
  if (rest.empty() || rest[0] != '/' || contains(split(rest, '/'), "..")) return "";
  return rest == "/" ? "" : rest;
}

double read_quota(const std::string& root) {
  double smallest = 0.0;
  const std::vector<Mount> mounts = cgroup_mounts(root);
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // "hierarchy:controllers:path", v2 has no controllers
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (!controllers.empty() && !contains(split(controllers, ','), "cpu")) continue;
    for (const Mount& mount : mounts) {
      if (mount.v2 != controllers.empty()) continue;
      std::string own = below(mount, path);
      for (;; own.erase(own.rfind('/'))) {
        smallest = smaller(quota_of(root + mount.point + own, mount.v2), smallest);
        if (own.empty()) break;
      }
    }
  }
  return smallest;
}

}  // namespace

double cpu_quota(const char* root) {
#if defined(__linux__)
  try {
    return read_quota(root);
  } catch (const std::exception&) {  // no memory to read it with
  }
#endif
  return 0.0;
}

int usable_cpus(const char* root) {
  const char* told = std::getenv("STARS_USABLE_CPUS");
  if (const long count = told ? std::strtol(told, nullptr, 10) : 0; count > 0)
    return static_cast<int>(std::min<long>(count, kMostThreads));
  const int cpus = affinity_cpus();
  const double quota = cpu_quota(root);
  return quota > 0.0 && quota < cpus ? static_cast<int>(std::ceil(quota)) : cpus;
}

}  // namespace stars
