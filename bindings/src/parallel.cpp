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

// The tasks of one thread, next in the high half and end in the low half, so that a claim is one compare-and-swap and
// a thread that runs out can take from another. A thread begins with the same share of the tasks each time: its part
// of a weight stays in its own cache.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};

  void set(uint32_t next, uint32_t end) { range.store(uint64_t{next} << 32 | end, std::memory_order_release); }

  bool claim(uint32_t& task) {
    uint64_t seen = range.load(std::memory_order_acquire);
    while ((seen >> 32) < (seen & 0xFFFFFFFF)) {
      if (range.compare_exchange_weak(seen, seen + (uint64_t{1} << 32), std::memory_order_acq_rel)) {
        task = static_cast<uint32_t>(seen >> 32);
        return true;
      }
    }
    return false;
  }
};

class Pool {
 public:
  explicit Pool(int threads) : shares_(new Share[threads]) {
    for (int i = 1; i < threads; ++i) {
      try {
        workers_.emplace_back([this, i] { work(i); });
      } catch (const std::system_error&) {  // no more threads to be had: fewer will do
        break;
      }
    }
    threads_ = static_cast<int>(workers_.size()) + 1;
  }

  ~Pool() {
    stop_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  void run(uint32_t count, void (*body)(void*, int64_t), void* context) {
    body_ = body;
    context_ = context;
    pending_.store(count, std::memory_order_relaxed);
    // A claim makes body_, context_ and pending_ visible, and they cannot change before the claimed task is reported.
    for (int i = 0; i < threads_; ++i) {
      shares_[i].set(static_cast<uint32_t>(uint64_t{count} * i / threads_),
                     static_cast<uint32_t>(uint64_t{count} * (i + 1) / threads_));
    }
    signal_.fetch_add(1);  // sequentially consistent, as is sleepers_: a worker sees this or is seen sleeping
    if (sleepers_.load()) signal_.notify_all();
    take(0);
    for (int spins = 0; pending_.load(std::memory_order_acquire); ++spins) {
      if (spins < 2000)
        pause();
      else
        std::this_thread::yield();  // the worker that holds the last task may be waiting for this very CPU
    }
  }

 private:
  void take(int own) {
    uint32_t finished = 0, task;
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(own + i) % threads_];
      while (share.claim(task)) {
        body_(context_, task);
        ++finished;
      }
    }
    if (finished) pending_.fetch_sub(finished, std::memory_order_acq_rel);
  }

  void work(int own) {
    uint32_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      for (int spins = 1; signal_.load(std::memory_order_acquire) == seen; ++spins) {
        pause();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
          sleepers_.fetch_add(1);
          signal_.wait(seen);
          sleepers_.fetch_sub(1);
        }
      }
      seen = signal_.load(std::memory_order_acquire);
      if (stop_.load()) return;
      take(own);
    }
  }

  // Workers read these only under a claim, except threads_, which is set before any task exists.
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::unique_ptr<Share[]> shares_;
  int threads_ = 1;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> signal_{0};
  alignas(64) std::atomic<uint32_t> pending_{0};
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

void parallel_for(int64_t count, void (*body)(void* context, int64_t task), void* context) {
  if (count > 1 && count <= UINT32_MAX && num_threads() > 1) {
    if (const Turn turn; turn) {
      State& s = state();
      if (!s.pool) s.pool = new Pool(s.wanted);
      s.pool->run(static_cast<uint32_t>(count), body, context);
      return;
    }
  }
  for (int64_t task = 0; task < count; ++task) body(context, task);
}

}  // namespace stars
