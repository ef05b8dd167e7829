#include "controller.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "handles.h"
#include "law.h"

namespace stars {
namespace {

constexpr int64_t kMaxAttempts = (1 << 24) - 1, kMaxSegments = 1 << 20, kMaxSamples = 1 << 12;

// What is left of a budget, of which 0 is none.
int64_t left(int64_t budget, int64_t spent) { return budget ? std::max<int64_t>(0, budget - spent) : INT64_MAX; }

// Whether the prompt's reward is in the threshold. An infinite threshold would swallow it.
bool reads_prompt(const stars_controller_params& p) { return p.alpha != 1.0 && std::isfinite(p.reward_threshold); }

}  // namespace

const char* controller::check(const stars_controller_params& p) {
  if (p.max_tokens < 1 || p.max_tokens > INT32_MAX) return "max_tokens must be between 1 and 2^31 - 1";
  if (p.segment_size < 1 || p.segment_size > INT32_MAX) return "segment_size must be between 1 and 2^31 - 1";
  if (p.max_attempts < 1 || p.max_attempts > kMaxAttempts) return "max_attempts must be between 1 and 2^24 - 1";
  if ((p.max_tokens - 1) / p.segment_size >= kMaxSegments)
    return "max_tokens makes more than 2^20 segments of segment_size: make segments longer";
  if (p.sample < 0 || p.sample >= kMaxSamples) return "sample must be between 0 and 4095";
  if (!(p.beta >= 0.0) || std::isinf(p.beta)) return "beta must be a finite number of at least 0";
  if (!(p.alpha >= 0.0 && p.alpha <= 1.0)) return "alpha must be between 0 and 1";
  if (std::isnan(p.reward_threshold)) return "reward_threshold must be a number; it may be infinite";
  if (reads_prompt(p) && !std::isfinite(p.prompt_reward))
    return "prompt_reward must be finite where alpha is not 1: score the prompt with an empty response first";
  if (p.attempts_budget < 0 || p.tokens_budget < 0 || p.rewards_budget < 0)
    return "attempts_budget, tokens_budget and rewards_budget must be >= 0 (0: none)";
  return nullptr;
}

controller::controller(const stars_controller_params& params)
    : params_(params), start_(law::threshold_start(params.prompt_reward, params.alpha, params.reward_threshold)) {
  done_.size = sizeof done_;
  done_.rewards = reads_prompt(params);
}

double controller::tau(int64_t tokens) const {
  return law::threshold(tokens, params_.max_tokens, start_, params_.reward_threshold);
}

int64_t controller::segment_tokens() const {
  return std::min(params_.segment_size, params_.max_tokens - done_.tokens);
}

const char* controller::next(stars_attempt* attempts, int64_t capacity, int64_t& count) {
  count = 0;
  if (capacity < 1 || !attempts) return "attempts must not be null and capacity at least 1";
  segment& s = segment_;
  if (done_.finish_reason != STARS_RUNNING) return nullptr;
  if (decided(s)) return "the segment is decided: commit it first";
  if (s.fed < s.drawn) return "attempts of this round have no rewards yet: feed those first";
  if (done_.segments >= kMaxSegments) return "the response has 2^20 segments: make segments longer";
  const int64_t tokens = segment_tokens();
  count = std::min({capacity, params_.max_attempts - s.drawn, left(params_.attempts_budget, done_.attempts),
                    left(params_.rewards_budget, done_.rewards),
                    left(params_.tokens_budget, done_.tokens_drawn) / tokens});
  if (count == 0) {  // what was drawn of the segment is dropped
    segment_ = {};
    done_.finish_reason = STARS_BUDGET;
    return nullptr;
  }
  s.tokens = static_cast<int32_t>(tokens);
  s.verdict = STARS_UNDECIDED;
  for (int64_t i = 0; i < count; ++i) {
    attempts[i] = {params_.seed, s.drawn + static_cast<int32_t>(i) + 1,
                   static_cast<int32_t>(static_cast<uint32_t>(done_.segments) |
                                        static_cast<uint32_t>(params_.sample) << 20),
                   s.tokens, 0};
  }
  s.drawn += static_cast<int32_t>(count);
  done_.attempts += count;
  return nullptr;
}

// The law, of the attempt that comes next in order. `note` may be null.
void controller::settle(segment& s, const stars_scored& one, stars_note* note) const {
  const double level = tau(done_.tokens + one.tokens);
  const double uniform = stars_accept_uniform(params_.seed, static_cast<uint32_t>(one.attempt),
                                              static_cast<uint32_t>(done_.segments),
                                              static_cast<uint32_t>(params_.sample));
  const bool accepted = law::accepts(uniform, one.reward, level, params_.beta);
  if (note) *note = {level, law::accept_probability(one.reward, level, params_.beta), accepted, 0};
  if (!s.best || one.reward > s.leading.reward) {  // of equal ones the earliest stays
    s.best = one.attempt;
    s.leading = one;
  }
  if (accepted) {
    s.verdict = STARS_ACCEPT;
    s.winner = one.attempt;
    s.winning = one;
  } else if (one.attempt == params_.max_attempts) {
    s.verdict = STARS_FALLBACK;
    s.winner = s.best;
    s.winning = s.leading;
  }
}

// What is wrong with results; null where nothing is. A reward that is none is one only up to the winner.
const char* controller::unusable(const stars_scored* scored, int64_t count) const {
  int64_t usable = count;  // rewards before the first that is none
  for (int64_t i = count; i-- > 0;) {
    if (scored[i].attempt != segment_.fed + i + 1)
      return "rewards are out of order: feed them in the order of the attempts";
    if (scored[i].tokens < 1 || scored[i].tokens > segment_.tokens)
      return "tokens must be between 1 and the attempt's max_tokens";
    if (!(scored[i].reward < law::infinity)) usable = i;
  }
  if (usable == count) return nullptr;
  segment s = segment_;
  for (int64_t i = 0; i < usable && !decided(s); ++i) settle(s, scored[i], nullptr);
  if (decided(s)) return nullptr;
  return std::isnan(scored[usable].reward) ? "a reward is NaN: it must be a number"
                                           : "a reward is +inf: it must be finite or -inf";
}

const char* controller::feed(const stars_scored* scored, int64_t count, stars_note* notes, stars_decision& decision) {
  if (count < 0 || (count && !scored)) return "count must be >= 0, and scored not null";
  if (done_.finish_reason != STARS_RUNNING) return "the request has ended: it takes no more rewards";
  if (count > segment_.drawn - segment_.fed) return "there are more rewards than attempts that lack one";
  if (const char* wrong = unusable(scored, count)) return wrong;
  segment& s = segment_;
  decision.read = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool counts_only = decided(s);
    if (!counts_only) {
      settle(s, scored[i], notes ? notes + i : nullptr);
      ++decision.read;
    } else if (notes) {
      notes[i] = {};
    }
    ++s.fed;
    s.fed_tokens += scored[i].tokens;
    s.rewards += !counts_only || !std::isnan(scored[i].reward);
  }
  if (s.verdict == STARS_UNDECIDED && s.fed == s.drawn && s.drawn) s.verdict = STARS_RETRY;
  decision.verdict = s.verdict;
  decision.winner = s.winner;
  decision.best = s.best;
  if (s.verdict == STARS_RETRY) pay();
  return nullptr;
}

// Counts what was drawn and scored since the last time. Of an attempt that was not fed nobody said how long it became.
void controller::pay() {
  segment& s = segment_;
  done_.tokens_drawn += s.fed_tokens + int64_t{s.drawn - s.fed} * s.tokens;
  done_.rewards += s.rewards;
  s.fed_tokens = s.rewards = 0;
}

const char* controller::commit() {
  segment& s = segment_;
  if (!decided(s)) return "the segment is not decided: feed rewards first";
  pay();
  done_.segments += 1;
  done_.tokens += s.winning.tokens;
  done_.reward = s.winning.reward;
  const bool accepted = s.verdict == STARS_ACCEPT;
  done_.accepted += accepted;
  done_.fallbacks += !accepted;
  done_.attempts_counted += accepted ? s.winner : s.drawn;
  if (s.winning.ended)
    done_.finish_reason = STARS_STOP;
  else if (done_.tokens >= params_.max_tokens)
    done_.finish_reason = STARS_LENGTH;
  segment_ = {};
  return nullptr;
}

void controller::abort() {
  pay();
  segment_ = {};
  if (done_.finish_reason == STARS_RUNNING) done_.finish_reason = STARS_ABORTED;
}

void controller::progress(stars_progress& out) const {
  out = done_;
  out.tried = segment_.fed;
  out.verdict = segment_.verdict;
}

}  // namespace stars

namespace {

stars::handle_table<stars::controller, stars_controller, stars::kController> controllers;
using taken = decltype(controllers)::taken;

constexpr char kOtherSize[] = "size must be the sizeof of the struct that this version of stars.h has";

int32_t result(const char* where, const char* wrong) { return wrong ? stars::fail(where, wrong) : STARS_OK; }

}  // namespace

stars_controller* stars_controller_open(const stars_controller_params* params) {
  constexpr char where[] = "stars_controller_open";
  const char* wrong = !params                             ? "params must not be null"
                      : params->size != sizeof(*params) ? kOtherSize
                                                          : stars::controller::check(*params);
  if (wrong) {
    stars::fail(where, wrong);
    return nullptr;
  }
  std::unique_ptr<stars::controller> fresh(new (std::nothrow) stars::controller(*params));
  if (fresh) return controllers.open(std::move(fresh), where);
  stars::fail_for_memory(where);
  return nullptr;
}

int64_t stars_controller_next(stars_controller* controller, stars_attempt* attempts, int64_t capacity) {
  constexpr char where[] = "stars_controller_next";
  taken held(controllers, controller, where);
  if (!held) return -held.status;
  int64_t count;
  const char* wrong = held->next(attempts, capacity, count);
  return wrong ? -stars::fail(where, wrong) : count;
}

int32_t stars_controller_feed(stars_controller* controller, const stars_scored* scored, int64_t count,
                              stars_note* notes, stars_decision* decision) {
  constexpr char where[] = "stars_controller_feed";
  taken held(controllers, controller, where);
  if (!held) return held.status;
  if (!decision) return stars::fail(where, "decision must not be null");
  if (decision->size != sizeof(*decision)) return stars::fail(where, kOtherSize);
  return result(where, held->feed(scored, count, notes, *decision));
}

int32_t stars_controller_commit(stars_controller* controller) {
  taken held(controllers, controller, "stars_controller_commit");
  return held ? result("stars_controller_commit", held->commit()) : held.status;
}

int32_t stars_controller_abort(stars_controller* controller) {
  taken held(controllers, controller, "stars_controller_abort");
  if (held) held->abort();
  return held.status;
}

int32_t stars_controller_progress(stars_controller* controller, stars_progress* out) {
  constexpr char where[] = "stars_controller_progress";
  taken held(controllers, controller, where);
  if (!held) return held.status;
  if (!out) return stars::fail(where, "out must not be null");
  if (out->size != sizeof(*out)) return stars::fail(where, kOtherSize);
  held->progress(*out);
  return STARS_OK;
}

int32_t stars_controller_close(stars_controller* controller) {
  return controllers.close(controller, "stars_controller_close");
}
