// The CPUs of the affinity mask and of a container's quota.
//
// A quota is rounded up, as Go's and Java's runtimes do: with 1.5 CPUs, two threads get through half as much again as
// one, though they stand still for a quarter of the time. More threads than that only use the quota up sooner.
//
// Read without iostreams: the first operation of every process comes through here, and a stream needs more of the C++
// library that the host happens to have loaded (locales, facets, exceptions within) than a few lines of digits are
// worth.
#include "cpus.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace stars {
namespace {

int affinity_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = std::min(std::max(count, 1), CPU_COUNT(&set));
#endif
  return std::clamp(count, 1, kMaxThreads);
}

// One mounted cgroup hierarchy that can limit CPU time.
struct Mount {
  bool v2;
  std::string root;   // the cgroup that lies at `point`
  std::string point;
};

// What lies between the `at`s; of an empty text nothing, and nothing after an `at` that ends it.
std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  while (!text.empty()) {
    const size_t end = std::min(text.find(at), text.size());
    parts.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

bool contains(const std::vector<std::string_view>& list, std::string_view item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// What can be read of a file: "" where there is none.
std::string text_of(const std::string& path) {
  std::string text;
#if defined(__linux__)
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return text;
  char part[4096];
  try {
    for (;;) {
      const ssize_t got = read(file, part, sizeof part);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      text.append(part, static_cast<size_t>(got));
    }
  } catch (...) {
    close(file);
    throw;
  }
  close(file);
#endif
  return text;
}

// Takes the next whole number from `text`: 0 where another word is next, and `number` as it was where nothing is.
void take_number(std::string_view& text, int64_t& number) {
  text.remove_prefix(std::min(text.find_first_not_of(" \n"), text.size()));
  if (text.empty()) return;
  number = 0;
  const char* end = std::from_chars(text.data(), text.data() + text.size(), number).ptr;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
}

// Spaces, tabs, newlines and backslashes stand as \ and three octal digits in mountinfo.
std::string unescaped(std::string_view text) {
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
  const std::string text = text_of(root + "/proc/self/mountinfo");
  for (const std::string_view line : split(text, '\n')) {
    const std::vector<std::string_view> fields = split(line, ' ');
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
  int64_t quota = -1, period = 100000;
  if (v2) {
    const std::string text = text_of(folder + "/cpu.max");
    std::string_view rest = text;
    take_number(rest, quota);  // "max" is no number, and no quota
    take_number(rest, period);
  } else {
    const std::string quota_text = text_of(folder + "/cpu.cfs_quota_us");  // -1: none
    const std::string period_text = text_of(folder + "/cpu.cfs_period_us");
    std::string_view rest = quota_text;
    take_number(rest, quota);
    rest = period_text;
    take_number(rest, period);
  }
  return quota > 0 && period > 0 ? static_cast<double>(quota) / static_cast<double>(period) : 0.0;
}

double smaller(double quota, double other) { return quota > 0.0 && (other <= 0.0 || quota < other) ? quota : other; }

// Where cgroup `path` lies below the mount, "" where it is the mount itself or lies outside of it, as seen from some
// namespaces.
std::string below(const Mount& mount, std::string_view path) {
  const std::string_view root = mount.root == "/" ? "" : std::string_view(mount.root);
  if (!path.starts_with(root)) return "";
  const std::string_view rest = path.substr(root.size());
  if (rest.empty() || rest[0] != '/' || contains(split(rest, '/'), "..")) return "";
  return rest == "/" ? "" : std::string(rest);
}

double read_quota(const std::string& root) {
  double smallest = 0.0;
  const std::vector<Mount> mounts = cgroup_mounts(root);
  const std::string text = text_of(root + "/proc/self/cgroup");
  for (const std::string_view line : split(text, '\n')) {  // "hierarchy:controllers:path", v2 has no controllers
    const size_t first = line.find(':');
    if (first == std::string_view::npos) continue;
    const size_t second = line.find(':', first + 1);
    if (second == std::string_view::npos) continue;
    const std::string_view controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
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
    return static_cast<int>(std::min<long>(count, kMaxThreads));
  const int cpus = affinity_cpus();
  const double quota = cpu_quota(root);
  return quota > 0.0 && quota < cpus ? static_cast<int>(std::ceil(quota)) : cpus;
}

}  // namespace stars
