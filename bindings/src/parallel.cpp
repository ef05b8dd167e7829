#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace stars {
namespace {

// Long enough to bridge the Python between two recorded passes, short enough that an idle engine uses no CPU.
constexpr auto kSpin = std::chrono::microseconds(300);
constexpr int kMostThreads = 256;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The tasks of one thread, next in the high half of `range` and end in the low half, so that a claim is one
// compare-and-swap and a thread that runs out can take from another. A thread begins with the same share of the tasks
// each time: its part of a weight stays in its own cache. What the thread needs to begin is all in this one cache line,
// on which it spins: every further line costs a transfer between cores, 50 to 170 ns each way where this was measured.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};
  Body body;  // read under a claim only

  // The range is empty before: a claim makes the body visible, and it stays until its task is reported.
  void offer(uint32_t next, uint32_t end) { range.store(uint64_t{next} << 32 | end, std::memory_order_release); }

  bool empty() const {
    const uint64_t seen = range.load(std::memory_order_relaxed);
    return (seen >> 32) >= (seen & 0xFFFFFFFF);
  }

  bool claim(uint32_t& task) {
    uint64_t seen = range.load(std::memory_order_relaxed);
    while ((seen >> 32) < (seen & 0xFFFFFFFF)) {
      if (range.compare_exchange_weak(seen, seen + (uint64_t{1} << 32), std::memory_order_acq_rel)) {
        task = static_cast<uint32_t>(seen >> 32);
        return true;
      }
    }
    return false;
  }

  // Runs what it can claim; how many tasks that was.
  uint32_t take() {
    uint32_t taken = 0, task;
    for (; claim(task); ++taken) body.call(body.captured, task);
    return taken;
  }
};
static_assert(sizeof(Share) == 64);

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), shares_(new Share[threads]) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {  // no more threads to be had: the others take the missing ones' shares
    }
  }

  ~Pool() {
    stop_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(uint32_t count, const Body& body) {
    for (int i = threads_ - 1; i >= 0; --i) {
      const uint32_t first = static_cast<uint32_t>(uint64_t{count} * i / threads_);
      shares_[i].body = body;
      // The caller's first task is not offered: a claim would wait until the others' shares have left this core.
      shares_[i].offer(first + (i == 0), static_cast<uint32_t>(uint64_t{count} * (i + 1) / threads_));
    }
    const bool woken = sleepers_.load(std::memory_order_relaxed) != 0;
    if (woken) wake();
    uint32_t own = 0;
    if (count >= static_cast<uint32_t>(threads_)) body.call(body.captured, 0), own = 1;
    if (!woken) {  // whoever fell asleep since then did not see the tasks, or is seen here
      std::atomic_thread_fence(std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_relaxed)) wake();
    }
    for (int i = 0; i < threads_; ++i) own += shares_[i].take();
    expected_ += count - own;
    for (int spins = 0; finished_.load(std::memory_order_acquire) != expected_; ++spins) {
      if (spins < 2000)
        pause();
      else
        std::this_thread::yield();  // the worker that holds the last task may be waiting for this very CPU
    }
  }

 private:
  void wake() {
    signal_.fetch_add(1);
    signal_.notify_all();
  }

  void report(uint32_t taken) {
    if (taken) finished_.fetch_add(taken, std::memory_order_acq_rel);
  }

  void work(int own) {
    const Share& share = shares_[own];
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      for (int spins = 1; share.empty(); ++spins) {
        if (stop_.load(std::memory_order_relaxed)) return;
        pause();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
          sleepers_.fetch_add(1);  // sequentially consistent, as is the fence of `run`
          const uint32_t seen = signal_.load();
          if (share.empty() && !stop_.load()) signal_.wait(seen);
          sleepers_.fetch_sub(1);
          break;
        }
      }
      // Reported before the others' shares are looked at: the caller may be waiting for this alone.
      report(shares_[own].take());
      uint32_t taken = 0;
      for (int i = 1; i < threads_; ++i) taken += shares_[(own + i) % threads_].take();
      report(taken);
    }
  }

  const int threads_;
  const std::unique_ptr<Share[]> shares_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> signal_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};  // tasks that workers ran since the beginning
  uint32_t expected_ = 0;                          // of the above, once all tasks offered so far are done
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
};

int available_cpus() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) count = std::min(std::max(count, 1), CPU_COUNT(&set));
#endif
  return std::clamp(count, 1, kMostThreads);
}

int default_threads() {
  const char* wanted = std::getenv("STARS_NUM_THREADS");
  const int count = wanted ? std::atoi(wanted) : 0;
  return count > 0 ? std::min(count, kMostThreads) : available_cpus();
}

// Never destroyed at exit: workers may outlive static destructors.
struct State {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  int wanted = 0;  // threads; 0: not decided yet
  Pool* pool = nullptr;
};

State& state() {
  static State* only = [] {
#if defined(__linux__)
    // A forked child has none of the workers: it forgets the pool and builds another when it needs one.
    pthread_atfork(nullptr, nullptr, [] {
      state().pool = nullptr;
      state().busy.clear();
    });
#endif
    return new State;
  }();
  return *only;
}

// Whoever comes while the pool is at work (a task, or a second thread of the host) does its work alone.
class Turn {
 public:
  Turn() : taken_(!state().busy.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (taken_) state().busy.clear(std::memory_order_release);
  }
  explicit operator bool() const { return taken_; }

 private:
  bool taken_;
};

}  // namespace

int num_threads() {
  State& s = state();
  if (s.wanted == 0) s.wanted = default_threads();
  return s.wanted;
}

void set_num_threads(int count) {
  const Turn turn;
  if (!turn) return;
  State& s = state();
  s.wanted = count > 0 ? std::min(count, kMostThreads) : default_threads();
  delete s.pool;
  s.pool = nullptr;
}

void parallel_for(int64_t count, const Body& body) {
  if (count > 1 && count <= UINT32_MAX && num_threads() > 1) {
    if (const Turn turn; turn) {
      State& s = state();
      if (!s.pool) s.pool = new Pool(s.wanted);
      s.pool->run(static_cast<uint32_t>(count), body);
      return;
    }
  }
  for (int64_t task = 0; task < count; ++task) body.call(body.captured, task);
}

}  // namespace stars
