// What libstars' segment controller and ledger cost a host: REQUESTS requests of LANES lanes, a segment of each a round.
//
//   controller_cost [rounds]        benchmarks/controller_cost.py builds it, runs it and keeps what it prints
//
// Prints a line of JSON for each way of using them: microseconds of a round, all requests together, by the clock and in
// CPU time of the one thread, as quartiles over the rounds. What a host does besides (drafting, scoring) is not there.
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "stars.h"

namespace {

constexpr int64_t kRequests = 256, kLanes = 16, kSegment = 16, kContext = 1032, kPage = 16;

[[noreturn]] void give_up() {
  std::fprintf(stderr, "controller_cost: %s\n", stars_last_error());
  std::exit(1);
}

void check(int64_t status) {
  if (status < 0 || status > 1) give_up();
}

template <class T>
T sized() {
  T made = {};
  made.size = sizeof made;
  return made;
}

enum class Pages {
  none,
  committed,  // one sequence a request: it is made longer by what was accepted, as where lanes have room of their own
  forked,     // a fork for every lane, made longer before it is drafted; the winner's goes on and the others are closed
};

struct Way {
  const char* name;
  double accept;  // probability of each attempt; 0: all are read, and the best of them wins
  bool notes;
  Pages pages;
};

struct Request {
  stars_controller* controller;
  stars_sequence* sequence;
};

class Host {
 public:
  explicit Host(const Way& way) : way_(way) {
    if (way.pages != Pages::none) {
      auto params = sized<stars_ledger_params>();
      params.page_size = kPage;
      params.num_pages = kRequests * (kContext / kPage + 2 + (way.pages == Pages::forked ? 3 * kLanes : 1));
      ledger_ = stars_ledger_open(&params);
      if (!ledger_) give_up();
    }
    for (int64_t i = 0; i < kRequests; ++i) {
      auto params = sized<stars_controller_params>();
      params.seed = 1000003u * static_cast<uint64_t>(i);
      params.alpha = 1.0;  // a threshold that does not rise
      params.beta = 1.0;
      params.reward_threshold = 0.0;
      params.max_tokens = int64_t{1} << 24;
      params.segment_size = kSegment;
      params.max_attempts = kLanes;
      Request request = {stars_controller_open(&params), nullptr};
      if (!request.controller) give_up();
      if (ledger_) {
        auto copy = sized<stars_page_copy>();
        request.sequence = stars_sequence_open(ledger_, 0, nullptr, 0);
        if (!request.sequence) give_up();
        check(stars_sequence_extend(request.sequence, kContext, &copy));
      }
      requests_.push_back(request);
    }
  }

  ~Host() {
    for (const Request& request : requests_) {
      stars_controller_close(request.controller);
      if (request.sequence) stars_sequence_close(request.sequence, nullptr, 0);
    }
    if (ledger_) stars_ledger_close(ledger_);
  }

  // A segment of every request.
  void round() {
    for (Request& request : requests_) one(request);
  }

 private:
  void one(Request& request) {
    auto copy = sized<stars_page_copy>();
    stars_attempt attempts[kLanes];
    stars_scored scored[kLanes];
    stars_note notes[kLanes];
    stars_sequence* lanes[kLanes];
    auto decision = sized<stars_decision>();
    const int64_t count = stars_controller_next(request.controller, attempts, kLanes);
    if (count != kLanes) give_up();
    if (way_.pages == Pages::forked)
      for (stars_sequence*& lane : lanes) {
        lane = stars_sequence_fork(request.sequence);
        if (!lane) give_up();
        check(stars_sequence_extend(lane, kSegment, &copy));
      }
    const double reward = way_.accept > 0.0 ? std::log(way_.accept) : -25.0;  // below the logarithm of any uniform
    for (int64_t i = 0; i < count; ++i)
      scored[i] = {reward - 1e-9 * static_cast<double>(i), attempts[i].attempt, attempts[i].max_tokens, 0, 0};
    check(-stars_controller_feed(request.controller, scored, count, way_.notes ? notes : nullptr, &decision));
    check(-stars_controller_commit(request.controller));
    if (way_.pages == Pages::committed) check(stars_sequence_extend(request.sequence, kSegment, &copy));
    if (way_.pages == Pages::forked) {
      std::swap(request.sequence, lanes[decision.winner - 1]);
      for (stars_sequence* lane : lanes) check(-stars_sequence_close(lane, nullptr, 0));
    }
    if (request.sequence) check(-stars_sequence_rewind(request.sequence, kContext));  // so that all rounds are alike
  }

  const Way way_;
  stars_ledger* ledger_ = nullptr;
  std::vector<Request> requests_;
};

double cpu_us() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

double quantile(std::vector<double> values, double at) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1))];
}

}  // namespace

int main(int count, char** arguments) {
  if (stars_check_version(STARS_ABI_VERSION) != STARS_OK) give_up();
  const int rounds = count > 1 ? std::max(4, std::atoi(arguments[1])) : 400;
  const Way ways[] = {{"controller, all 16 attempts read", 0.0, false, Pages::none},
                      {"controller, accept rate 0.3", 0.3, false, Pages::none},
                      {"controller, all 16 attempts read, with notes", 0.0, true, Pages::none},
                      {"controller, accept rate 0.3, and the ledger at the commit", 0.3, false, Pages::committed},
                      {"controller, accept rate 0.3, and a fork of the ledger for every lane", 0.3, false, Pages::forked}};
  for (const Way& way : ways) {
    Host host(way);
    std::vector<double> wall, cpu;
    for (int i = 0; i < 10; ++i) host.round();
    for (int i = 0; i < rounds; ++i) {
      const auto begin = std::chrono::steady_clock::now();
      const double cpu_begin = cpu_us();
      host.round();
      cpu.push_back(cpu_us() - cpu_begin);
      wall.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
    }
    std::printf("{\"name\": \"%s\", \"rounds\": %d, \"requests\": %d, \"lanes\": %d", way.name, rounds,
                static_cast<int>(kRequests), static_cast<int>(kLanes));
    for (const auto& [clock, values] : {std::pair("wall_us", &wall), std::pair("cpu_us", &cpu)})
      std::printf(", \"%s\": [%.2f, %.2f, %.2f]", clock, quantile(*values, 0.25), quantile(*values, 0.5),
                  quantile(*values, 0.75));
    std::printf("}\n");
    std::fflush(stdout);
  }
  return 0;
}
