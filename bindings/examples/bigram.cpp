// The same as bigram.c in C++20, a sample in each thread: every thread has a controller of its own.
//
//   bigram [seed] [width] [samples]     e.g. bigram 7 4 2
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "bigram.h"
#include "stars.h"

namespace stars {

// What the library refused, with its text.
struct error : std::runtime_error {
  error() : std::runtime_error(stars_last_error()) {}
};

inline void check(int32_t status) {
  if (status != STARS_OK) throw error();
}

// A struct of stars.h that knows its size.
template <class T>
T sized() {
  T made = {};
  made.size = sizeof made;
  return made;
}

// One request. It may move between threads, and has one caller at a time.
class controller {
 public:
  explicit controller(const stars_controller_params& params) : handle_(stars_controller_open(&params)) {
    if (!handle_) throw error();
  }

  // Up to `most` attempts of the round that begins; none at the end. Valid until the next call.
  std::span<const stars_attempt> next(size_t most) {
    attempts_.resize(most);
    const int64_t count = stars_controller_next(handle_.get(), attempts_.data(), static_cast<int64_t>(most));
    if (count < 0) throw error();
    return {attempts_.data(), static_cast<size_t>(count)};
  }

  stars_decision feed(std::span<const stars_scored> scored) {
    auto decision = sized<stars_decision>();
    check(stars_controller_feed(handle_.get(), scored.data(), static_cast<int64_t>(scored.size()), nullptr, &decision));
    return decision;
  }

  void commit() { check(stars_controller_commit(handle_.get())); }

  stars_progress progress() const {
    auto made = sized<stars_progress>();
    check(stars_controller_progress(handle_.get(), &made));
    return made;
  }

 private:
  struct closer {
    void operator()(stars_controller* handle) const { stars_controller_close(handle); }
  };
  std::unique_ptr<stars_controller, closer> handle_;
  std::vector<stars_attempt> attempts_;
};

}  // namespace stars

namespace {

using tokens = std::vector<int32_t>;

// The draft of one attempt: at each place the argmax of logits and the attempt's own noise, which is a draw.
tokens draft(const stars_attempt& attempt, int32_t last) {
  tokens made;
  while (std::ssize(made) < attempt.max_tokens) {
    float noise[VOCAB];
    stars::check(stars_gumbel(attempt.seed, static_cast<uint32_t>(made.size()), static_cast<uint32_t>(attempt.attempt),
                              static_cast<uint32_t>(attempt.stream), VOCAB, noise));
    int32_t best = 0;
    for (int32_t token = 0; token < VOCAB; ++token) {
      noise[token] += static_cast<float>(LOGITS[last][token] - '0');
      if (noise[token] > noise[best]) best = token;
    }
    made.push_back(last = best);
    if (last == EOS) break;
  }
  return made;
}

// Of a response, or of its beginning, and what is to follow it.
double reward_of(const tokens& response, const tokens& more) {
  double sum = 0.0;
  for (const int32_t token : response) sum += LIKED[token];
  for (const int32_t token : more) sum += LIKED[token];
  return sum;
}

std::string respond(uint64_t seed, size_t width, int64_t sample) {
  auto params = stars::sized<stars_controller_params>();
  params.seed = seed;
  params.sample = sample;
  params.reward_threshold = 4.0;
  params.beta = 0.25;
  params.alpha = 0.25;
  params.prompt_reward = 0.0;  // of the empty response
  params.max_tokens = 40;
  params.segment_size = 5;
  params.max_attempts = 12;
  stars::controller controller(params);

  std::string told;
  char line[128];
  tokens response;
  std::vector<tokens> drafts;  // of this segment, all rounds: the best seen may win in the end
  for (auto attempts = controller.next(width); !attempts.empty(); attempts = controller.next(width)) {
    std::vector<stars_scored> scored;
    for (const stars_attempt& attempt : attempts) {  // a host drafts them in one batch, and scores them in another
      const tokens& one = drafts.emplace_back(draft(attempt, response.empty() ? EOS : response.back()));
      scored.push_back({reward_of(response, one), attempt.attempt, static_cast<int32_t>(one.size()),
                        one.back() == EOS, 0});
    }
    const stars_decision decision = controller.feed(scored);
    if (decision.verdict != STARS_ACCEPT && decision.verdict != STARS_FALLBACK) continue;
    const tokens& winner = drafts[static_cast<size_t>(decision.winner - 1)];
    for (const int32_t token : winner) told.append(WORDS[token]).append(" ");
    response.insert(response.end(), winner.begin(), winner.end());
    std::snprintf(line, sizeof line, "[attempt %d%s, reward %.3f]\n", static_cast<int>(decision.winner),
                  decision.verdict == STARS_ACCEPT ? "" : ", the best of all that were rejected",
                  reward_of(response, {}));
    told += line;
    drafts.clear();
    controller.commit();
  }
  const stars_progress progress = controller.progress();
  std::snprintf(line, sizeof line, "= %s: %lld segments, %lld of %lld attempts accepted\n",
                progress.finish_reason == STARS_STOP ? "stop" : "length", static_cast<long long>(progress.segments),
                static_cast<long long>(progress.accepted), static_cast<long long>(progress.attempts_counted));
  return told + line;
}

template <class T>
bool read(const char* text, T& value) {
  const std::string_view whole = text;
  const auto [end, wrong] = std::from_chars(whole.data(), whole.data() + whole.size(), value);
  return wrong == std::errc{} && end == whole.data() + whole.size();
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t seed = 7;
  size_t width = 4, samples = 1;
  if ((argc > 1 && !read(argv[1], seed)) || (argc > 2 && !read(argv[2], width)) ||
      (argc > 3 && !read(argv[3], samples)) || width < 1 || width > 16 || samples < 1 || samples > 4096) {
    std::fprintf(stderr, "usage: bigram [seed] [width, 1 to 16] [samples, 1 to 4096]\n");
    return 2;
  }
  try {
    stars::check(stars_check_version(STARS_ABI_VERSION));
    std::vector<std::string> told(samples), wrong(samples);
    std::vector<std::thread> threads;
    for (size_t sample = 0; sample < samples; ++sample)
      threads.emplace_back([&, sample] {
        try {
          told[sample] = respond(seed, width, static_cast<int64_t>(sample));
        } catch (const std::exception& problem) {
          wrong[sample] = problem.what();
        }
      });
    for (std::thread& thread : threads) thread.join();
    for (size_t sample = 0; sample < samples; ++sample) {
      if (!wrong[sample].empty()) throw std::runtime_error(wrong[sample]);
      std::fputs(told[sample].c_str(), stdout);
    }
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
  return 0;
}
