// Handles that several threads use, rightly and wrongly, for a sanitizer to see; `make sanitize` runs it.
//
//   stars_handles [seconds]
//
// Three threads have controllers and sequences of their own. Two more share a controller and a ledger, call whatever they
// like of them, close them and open others: each call comes through, or is refused as busy, closed or out of order, and
// never meets another one inside. Prints what it did; exits 1 at the first error.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "stars.h"

namespace {

[[noreturn]] void give_up(const std::string& what) {
  std::fprintf(stderr, "stars_handles: %s (%s)\n", what.c_str(), stars_last_error());
  std::_Exit(1);
}

void require(bool condition, const std::string& what) {
  if (!condition) give_up(what);
}

template <class T>
T sized() {
  T made = {};
  made.size = sizeof made;
  return made;
}

// A request from its opening to its close; what became of it.
std::vector<double> request(uint64_t seed) {
  auto params = sized<stars_controller_params>();
  params = {sizeof params, seed, 1.0, 0.5, 0.25, -1.0, 40, 4, 9, 5, 0, 0, 0};
  stars_controller* const controller = stars_controller_open(&params);
  require(controller != nullptr, "open");
  std::vector<double> told;
  stars_attempt attempts[5];
  for (int64_t count; (count = stars_controller_next(controller, attempts, 5)) > 0;) {
    stars_scored scored[5] = {};
    auto decision = sized<stars_decision>();
    for (int64_t i = 0; i < count; ++i)
      scored[i] = {0.125 * (attempts[i].attempt * 7 % 11), attempts[i].attempt, attempts[i].max_tokens, 0, 0};
    require(stars_controller_feed(controller, scored, count, nullptr, &decision) == STARS_OK, "feed");
    told.insert(told.end(), {1.0 * decision.verdict, 1.0 * decision.winner, 1.0 * decision.read});
    if (decision.winner) require(stars_controller_commit(controller) == STARS_OK, "commit");
  }
  auto progress = sized<stars_progress>();
  require(stars_controller_progress(controller, &progress) == STARS_OK, "progress");
  require(progress.finish_reason == STARS_LENGTH, "a request that ends");
  require(stars_controller_close(controller) == STARS_OK, "close");
  return told;
}

// Sequences of a ledger: forked, extended, rewound, and none of its pages lost.
void sequences() {
  auto params = sized<stars_ledger_params>();
  params.num_pages = 64;
  params.page_size = 4;
  stars_ledger* const ledger = stars_ledger_open(&params);
  auto copy = sized<stars_page_copy>();
  stars_sequence* const base = stars_sequence_open(ledger, 0, nullptr, 0);
  require(base && stars_sequence_extend(base, 10, &copy) == 0, "extend");
  stars_sequence* const fork = stars_sequence_fork(base);
  require(fork && stars_sequence_extend(fork, 6, &copy) == 1, "a fork that writes to a shared page");
  require(stars_sequence_rewind(fork, 3) == STARS_OK && stars_sequence_length(fork) == 3, "rewind");
  require(stars_sequence_close(fork, nullptr, 0) == STARS_OK, "close");
  require(stars_sequence_close(base, nullptr, 0) == STARS_OK, "close");
  require(stars_ledger_check(ledger, nullptr) == STARS_OK, "the books");
  require(stars_ledger_close(ledger) == STARS_OK, "close");
}

struct Counts {
  std::atomic<int64_t> done{0}, busy{0}, closed{0}, refused{0};

  void count(int64_t status) {
    if (status < 0) status = -status;
    require(status <= STARS_BUSY, "a status of misuse");
    if (status == STARS_BUSY) require(std::strstr(stars_last_error(), "another thread") != nullptr, "its text");
    ++(status == STARS_OK ? done : status == STARS_BUSY ? busy : status == STARS_CLOSED ? closed : refused);
  }
};

// Two threads that share what has one caller at a time. Many attempts and pages make some calls long.
class Shared {
 public:
  Shared() { reopen(); }

  void misuse(uint32_t drawn, Counts& controllers, Counts& ledgers) {
    static constexpr int64_t kRoom = 1024;
    thread_local std::vector<stars_attempt> attempts(kRoom);
    thread_local std::vector<stars_scored> scored(kRoom);
    thread_local std::vector<stars_note> notes(kRoom);
    thread_local std::vector<int32_t> pages(kRoom);
    stars_controller* const controller = controller_;
    stars_ledger* const ledger = ledger_;
    stars_sequence* const sequence = sequence_;
    auto progress = sized<stars_progress>();
    auto decision = sized<stars_decision>();
    auto copy = sized<stars_page_copy>();
    switch (drawn % 12) {
      case 0: {
        const int64_t count = stars_controller_next(controller, attempts.data(), kRoom);
        return controllers.count(std::min<int64_t>(count, 0));
      }
      case 1: return controllers.count(stars_controller_commit(controller));
      case 2: return controllers.count(stars_controller_progress(controller, &progress));
      case 3:
      case 4:
      case 5: {
        for (int64_t i = 0; i < kRoom; ++i) scored[i] = {-9.0, attempts[0].attempt + static_cast<int32_t>(i), 1, 0, 0};
        return controllers.count(stars_controller_feed(controller, scored.data(), kRoom, notes.data(), &decision));
      }
      case 6: {
        const int32_t moved = stars_sequence_extend(sequence, 64, &copy);
        return ledgers.count(std::min(moved, 0));
      }
      case 7: return ledgers.count(stars_sequence_rewind(sequence, 8));
      case 8: return ledgers.count(stars_ledger_check(ledger, nullptr));
      case 9: {
        const int64_t held = stars_sequence_pages(sequence, pages.data(), kRoom);
        return ledgers.count(std::min<int64_t>(held, 0));
      }
      case 10: {
        stars_sequence* const fork = stars_sequence_fork(sequence);
        if (!fork) return ledgers.count(stars_last_status());
        while (stars_sequence_close(fork, nullptr, 0) == STARS_BUSY) {  // its ledger is at work for the other thread
        }
        return ledgers.count(STARS_OK);
      }
      default:
        if (drawn % 1200 == 11 && stars_controller_close(controller) == STARS_OK) reopen();
    }
  }

  void close() {
    require(stars_controller_close(controller_) == STARS_OK, "close of what was misused");
    require(stars_controller_close(controller_) == STARS_CLOSED, "close once more");
    require(stars_sequence_close(sequence_, nullptr, 0) == STARS_OK, "close of what was misused");
    require(stars_ledger_check(ledger_, nullptr) == STARS_OK, "the books of what was misused");
    require(stars_ledger_close(ledger_) == STARS_OK, "close of what was misused");
  }

 private:
  void reopen() {
    auto params = sized<stars_controller_params>();
    params = {sizeof params, 3, 1.0, 0.5, 0.25, -1.0, 40, 4, 1 << 20, 5, 0, 0, 0};
    controller_ = stars_controller_open(&params);
    if (ledger_) return;
    auto pages = sized<stars_ledger_params>();
    pages.num_pages = 1024;
    pages.page_size = 4;
    ledger_ = stars_ledger_open(&pages);
    sequence_ = stars_sequence_open(ledger_, 0, nullptr, 0);
  }

  std::atomic<stars_controller*> controller_{nullptr};
  std::atomic<stars_ledger*> ledger_{nullptr};
  std::atomic<stars_sequence*> sequence_{nullptr};
};

}  // namespace

int main(int count, char** arguments) {
  const int seconds = count > 1 ? std::atoi(arguments[1]) : 3;
  std::atomic<bool> stop{false};
  std::atomic<int64_t> requests{0};
  Counts controllers, ledgers;
  Shared shared;
  const std::vector<double> expected = request(7);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      for (; !stop; ++requests) {
        require(request(7) == expected, "a request beside others");
        sequences();
      }
    });
  for (uint32_t i = 0; i < 2; ++i)
    threads.emplace_back([&, i] {
      std::mt19937 generator(i);
      while (!stop) shared.misuse(generator(), controllers, ledgers);
    });
  const auto met = [&] {
    return controllers.busy && controllers.closed && controllers.done && ledgers.busy && ledgers.done;
  };
  for (int tenths = 0; tenths < 10 * seconds || (!met() && tenths < 600); ++tenths)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  require(met(), "two threads that meet at a handle");
  shared.close();
  std::printf("%lld requests", static_cast<long long>(requests));
  const std::pair<const char*, const Counts&> both[] = {{"controller", controllers}, {"ledger", ledgers}};
  for (const auto& [name, counts] : both)
    std::printf("; a %s misused: %lld done, %lld busy, %lld closed, %lld refused", name,
                static_cast<long long>(counts.done), static_cast<long long>(counts.busy),
                static_cast<long long>(counts.closed), static_cast<long long>(counts.refused));
  std::printf("\n");
}
