#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "cpus.h"
#include "error.h"

#if defined(__linux__)
#include <pthread.h>
#endif

namespace stars {
namespace {

// Long enough to bridge the Python between two recorded passes, short enough that an idle engine uses no CPU.
constexpr auto kSpin = std::chrono::microseconds(300);

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
// on which it spins: every further line costs a transfer between cores (benchmarks/README.md).
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
  uint32_t take(std::atomic<bool>& failed) {
    uint32_t taken = 0, task;
    for (; claim(task); ++taken) call(body, task, failed);
    return taken;
  }

  // An exception would end the process in a worker, and leave the caller before the workers are done with its data.
  static void call(const Body& body, uint32_t task, std::atomic<bool>& failed) {
    try {
      body.call(body.captured, task);
    } catch (const std::exception&) {
      failed.store(true, std::memory_order_relaxed);  // seen through the report of the task
    }
  }
};
static_assert(sizeof(Share) == 64);

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), shares_(new Share[threads]) {
    workers_.reserve(threads);  // so that all that can fail below is a thread, and it is not in the list then
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::exception&) {  // no more threads to be had: the others take the missing ones' shares
    }
    // A process may end right after its first operation. In a program that is linked statically the unwinder ends with
    // it, and would abort in a worker that is at its first exception then.
    const uint32_t begun = static_cast<uint32_t>(workers_.size());
    for (uint32_t ready; (ready = ready_.load()) != begun;) ready_.wait(ready);
  }

  ~Pool() {
    stop_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

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
    if (count >= static_cast<uint32_t>(threads_)) Share::call(body, 0, failed_), own = 1;
    if (!woken) {  // whoever fell asleep since then did not see the tasks, or is seen here
      std::atomic_thread_fence(std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_relaxed)) wake();
    }
    for (int i = 0; i < threads_; ++i) own += shares_[i].take(failed_);
    expected_ += count - own;
    for (int spins = 0; finished_.load(std::memory_order_acquire) != expected_; ++spins) {
      if (spins < 2000)
        pause();
      else
        std::this_thread::yield();  // the worker that holds the last task may be waiting for this very CPU
    }
    if (failed_.load(std::memory_order_relaxed)) {
      failed_.store(false, std::memory_order_relaxed);
      out_of_memory();
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
    try {
      out_of_memory();  // what a thread's first exception needs is made while there is memory for it
    } catch (const std::exception&) {
    }
    ready_.fetch_add(1);
    ready_.notify_one();
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
      report(shares_[own].take(failed_));
      uint32_t taken = 0;
      for (int i = 1; i < threads_; ++i) taken += shares_[(own + i) % threads_].take(failed_);
      report(taken);
    }
  }

  const int threads_;
  const std::unique_ptr<Share[]> shares_;
  std::vector<std::thread> workers_;
  alignas(64) std::atomic<uint32_t> signal_{0};
  alignas(64) std::atomic<uint32_t> finished_{0};  // tasks that workers ran since the beginning
  uint32_t expected_ = 0;                          // of the above, once all tasks offered so far are done
  std::atomic<bool> failed_{false};                // one of this call's tasks threw
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> ready_{0};  // workers that have begun
  std::atomic<bool> stop_{false};
};

int default_threads() {
  const char* wanted = std::getenv("STARS_NUM_THREADS");
  const long count = wanted ? std::strtol(wanted, nullptr, 10) : 0;
  const int usable = usable_cpus("");
  return count > 0 ? static_cast<int>(std::min<long>(count, usable)) : usable;
}

// Made before any thread can use it and never destroyed: workers may outlive static destructors.
struct State {
  std::atomic_flag busy;
  std::atomic<int> wanted{0};  // threads; 0: not decided yet
  Pool* pool = nullptr;        // of whoever set `busy`
};
constinit State state;

#if defined(__linux__)
// A forked child has none of the workers, nor the thread that may have been at work: it forgets the pool, and builds
// another when it needs one.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  state.pool = nullptr;
  state.busy.clear();
});
#endif

// Whoever comes while the pool is at work (a task, or a second thread of the host) does its work alone.
class Turn {
 public:
  Turn() : taken_(!state.busy.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (taken_) state.busy.clear(std::memory_order_release);
  }
  explicit operator bool() const { return taken_; }

 private:
  bool taken_;
};

void drop_pool() {
  delete state.pool;
  state.pool = nullptr;
}

// Of `threads` threads, for whoever has the turn; null where there is no memory for one.
Pool* pool_of(int threads) {
  if (state.pool && state.pool->threads() == threads) return state.pool;
  drop_pool();
  try {
    state.pool = new Pool(threads);
  } catch (const std::exception&) {
  }
  return state.pool;
}

thread_local bool keeps_to_itself = false;

}  // namespace

int num_threads() {
  int count = state.wanted.load(std::memory_order_relaxed);
  if (count == 0) {
    const int decided = default_threads();
    // Where another thread has set a number meanwhile, that is the one.
    if (state.wanted.compare_exchange_strong(count, decided, std::memory_order_relaxed)) count = decided;
  }
  return count;
}

void set_num_threads(int count) {
  const int threads = count > 0 ? std::min(count, usable_cpus("")) : default_threads();
  state.wanted.store(threads, std::memory_order_relaxed);
  // Workers of another number end now, or, where they are at work, once the next operation wants others.
  if (const Turn turn; turn && state.pool && state.pool->threads() != threads) drop_pool();
}

bool set_alone(bool alone) { return std::exchange(keeps_to_itself, alone); }

void parallel_for(int64_t count, const Body& body) {
  if (const int threads = num_threads(); count > 1 && count <= UINT32_MAX && threads > 1 && !keeps_to_itself) {
    if (const Turn turn; turn) {
      if (Pool* pool = pool_of(threads)) return pool->run(static_cast<uint32_t>(count), body);
    }
  }
  for (int64_t task = 0; task < count; ++task) body.call(body.captured, task);
}

}  // namespace stars
