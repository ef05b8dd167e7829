// The segment controller under random operations, right ones and wrong ones. What was refused must have changed nothing;
// attempts come in order, with their request's random numbers; every verdict is the law's, computed here anew; and what
// progress says adds up, within the budgets.
#include "fuzz.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kClose = 1e-9;  // |log u - (r - tau) / beta| below which libraries' logarithms may decide differently

int64_t close_calls = 0, decisions = 0;

class Run {
 public:
  explicit Run(fuzz::Bytes& bytes) : bytes_(bytes) { open(); }

  void all() {
    while (bytes_.left()) {
      one();
      ++fuzz::operations;
      adds_up();
    }
    close();
  }

 private:
  double number() {
    static constexpr double numbers[] = {0.0, -0.0, 1.0, -1.0, 0.5, 3.25, -7.5, 1e300, -1e300, 1e-300, 5e-324,
                                         std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity};
    const uint8_t byte = bytes_.byte();
    return byte < 28 ? numbers[byte / 2] : (byte - 141) / 32.0;
  }

  void open() {
    for (int tries = 0;; ++tries) {
      stars_controller_params p = {};
      p.size = sizeof p;
      p.seed = bytes_.byte() * 0x0101010101010101u;
      p.reward_threshold = number();
      p.beta = bytes_.one_in(8) ? number() : bytes_.below(4) / 2.0;
      p.alpha = bytes_.one_in(8) ? number() : bytes_.below(5) / 4.0;
      p.prompt_reward = number();
      p.max_tokens = bytes_.one_in(32) ? -bytes_.below(2) : 1 + bytes_.byte();
      p.segment_size = bytes_.one_in(32) ? -bytes_.below(2) : 1 + bytes_.below(40);
      p.max_attempts = bytes_.one_in(32) ? bytes_.below(2) << 24 : 1 + bytes_.below(9);
      p.sample = bytes_.one_in(32) ? -1 + 4097 * bytes_.below(2) : bytes_.below(5);
      p.attempts_budget = bytes_.one_in(4) ? bytes_.byte() - bytes_.one_in(16) : 0;
      p.tokens_budget = bytes_.one_in(4) ? 8 * bytes_.byte() - bytes_.one_in(16) : 0;
      p.rewards_budget = bytes_.one_in(4) ? bytes_.byte() - bytes_.one_in(16) : 0;
      if (tries == 2) p = {sizeof p, 1, 0.5, 0.5, 0.5, 0.0, 64, 8, 4, 0, 0, 0, 0};
      if (bytes_.one_in(32)) p.size -= 8;
      const bool reads = p.alpha != 1.0 && std::isfinite(p.reward_threshold);
      const bool good = p.size == sizeof p && p.beta >= 0.0 && std::isfinite(p.beta) && p.alpha >= 0.0 &&
                        p.alpha <= 1.0 && !std::isnan(p.reward_threshold) && p.max_tokens > 0 && p.segment_size > 0 &&
                        p.max_attempts > 0 && p.max_attempts < 1 << 24 && p.sample >= 0 && p.sample < 4096 &&
                        p.attempts_budget >= 0 && p.tokens_budget >= 0 && p.rewards_budget >= 0 &&
                        (!reads || std::isfinite(p.prompt_reward));
      controller_ = stars_controller_open(&p);
      HOLDS((controller_ != nullptr) == good);
      if (controller_) {
        params_ = p;
        reads_ = reads;
        break;
      }
      HOLDS(stars_last_status() == STARS_INVALID);
      ++fuzz::refused;
    }
    drawn_ = fed_ = most_ = best_ = winner_ = 0;
    best_reward_ = 0.0;
  }

  stars_progress progress() const {
    stars_progress out = {};
    out.size = sizeof out;
    HOLDS(stars_controller_progress(controller_, &out) == STARS_OK);
    return out;
  }

  void adds_up() const {
    const stars_progress now = progress();
    HOLDS(now.accepted + now.fallbacks == now.segments && now.attempts_counted <= now.attempts);
    HOLDS(now.attempts_counted >= now.segments && now.tokens <= params_.max_tokens);
    HOLDS(now.tokens >= now.segments && now.tried == fed_);
    HOLDS(now.finish_reason >= STARS_RUNNING && now.finish_reason <= STARS_ABORTED);
    HOLDS(!params_.attempts_budget || now.attempts <= params_.attempts_budget);
    HOLDS(!params_.tokens_budget || now.tokens_drawn <= params_.tokens_budget);
    HOLDS(!params_.rewards_budget || now.rewards <= std::max<int64_t>(params_.rewards_budget, reads_));
    HOLDS(now.rewards - reads_ <= now.attempts);
    HOLDS(now.tokens < params_.max_tokens || now.finish_reason == STARS_LENGTH || now.finish_reason == STARS_STOP);
  }

  // Whether a call came through; where it did not, nothing has changed.
  bool came_through(int32_t status, const stars_progress& before) {
    if (status == STARS_OK) return true;
    HOLDS(status == STARS_INVALID && stars_last_status() == status && std::strlen(stars_last_error()) > 20);
    const stars_progress after = progress();
    HOLDS(std::memcmp(&before, &after, sizeof before) == 0);
    ++fuzz::refused;
    return false;
  }

  void one() {
    const stars_progress before = progress();
    switch (bytes_.below(16)) {
      case 10: return next(before);
      case 11: return feed(before);
      case 12: return commit(before);
      case 13:
        if (!bytes_.one_in(8)) return;
        HOLDS(stars_controller_abort(controller_) == STARS_OK);
        HOLDS(progress().finish_reason == (before.finish_reason ? before.finish_reason : STARS_ABORTED));
        return forget_segment();
      case 14: return wrong(before);
      case 15: if (bytes_.one_in(4)) anew(); return;
      default:  // what comes next, mostly
        if (before.finish_reason != STARS_RUNNING) return anew();
        return decided() ? commit(before) : fed_ < drawn_ ? feed(before) : next(before);
    }
  }

  void anew() {
    close();
    open();
  }

  bool decided() const { return winner_ != 0; }

  void forget_segment() {
    drawn_ = fed_ = best_ = winner_ = 0;
    best_reward_ = 0.0;
  }

  void next(const stars_progress& before) {
    stars_attempt attempts[8];
    const int64_t capacity = bytes_.below(9);
    const int64_t count = stars_controller_next(controller_, attempts, capacity);
    HOLDS(count <= capacity);
    if (count < 0) {
      HOLDS(!capacity || (!before.finish_reason && (decided() || fed_ < drawn_)));
      came_through(static_cast<int32_t>(-count), before);
      return;
    }
    HOLDS(capacity && !decided() && (fed_ == drawn_ || before.finish_reason));
    if (count == 0) {
      HOLDS(progress().finish_reason != STARS_RUNNING);
      if (!before.finish_reason) HOLDS(progress().finish_reason == STARS_BUDGET);
      return forget_segment();
    }
    HOLDS(before.finish_reason == STARS_RUNNING && progress().attempts == before.attempts + count);
    most_ = attempts[0].max_tokens;
    HOLDS(most_ == std::min(params_.segment_size, params_.max_tokens - before.tokens));
    for (int64_t i = 0; i < count; ++i) {
      HOLDS(attempts[i].attempt == drawn_ + i + 1 && attempts[i].attempt <= params_.max_attempts);
      HOLDS(attempts[i].seed == params_.seed && attempts[i].max_tokens == most_);
      HOLDS(attempts[i].stream == static_cast<int32_t>(before.segments + (params_.sample << 20)));
    }
    drawn_ += static_cast<int32_t>(count);
  }

  void feed(const stars_progress& before) {
    stars_scored scored[8];
    stars_note notes[8];
    const bool right = !bytes_.one_in(4);
    const int64_t open_attempts = drawn_ - fed_;
    const int64_t count = right ? std::min<int64_t>(open_attempts, bytes_.below(9)) : bytes_.below(9);
    bool good = before.finish_reason == STARS_RUNNING && count <= open_attempts;
    bool over = decided();
    // The law once more, of the attempts that are to be read.
    int32_t winner = winner_, best = best_;
    double best_reward = best_reward_;
    bool unsure = false;
    int64_t read = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool last = fed_ + i + 1 == params_.max_attempts;
      scored[i] = {number(), static_cast<int32_t>(fed_ + i + 1), 1 + bytes_.below(most_), bytes_.one_in(16), 0};
      if (right && !over && !(scored[i].reward < kInfinity)) scored[i].reward = 0.75;
      if (!right && bytes_.one_in(4)) scored[i].attempt += bytes_.below(3) - 1;
      if (!right && bytes_.one_in(8)) scored[i].tokens = bytes_.one_in(2) ? 0 : most_ + 1;
      const stars_scored& one = scored[i];
      good = good && one.attempt == fed_ + i + 1 && one.tokens >= 1 && one.tokens <= most_;
      if (over) continue;
      good = good && one.reward < kInfinity;  // no NaN either
      if (!good) continue;
      ++read;
      const bool accepted = accepts(one, before, unsure);
      if (!best || one.reward > best_reward) {
        best = one.attempt;
        best_reward = one.reward;
      }
      over = accepted || last;
      winner = accepted ? one.attempt : last ? best : 0;
    }
    stars_decision decision = {};
    decision.size = sizeof decision;
    const int32_t status = stars_controller_feed(controller_, scored, count, bytes_.one_in(4) ? nullptr : notes,
                                                 &decision);
    if (unsure && status == STARS_OK) {  // as it says; counted
      ++close_calls;
      winner = decision.winner;
      best = decision.best;
      read = decision.read;
      if (best) best_reward = best > fed_ ? scored[best - fed_ - 1].reward : best_reward_;
    } else {
      HOLDS((status == STARS_OK) == good);
    }
    if (!came_through(status, before)) return;
    decisions += read;
    HOLDS(decision.winner == winner && decision.best == best && decision.read == read);
    fed_ += static_cast<int32_t>(count);
    winner_ = winner;
    best_ = best;
    best_reward_ = best_reward;
    const int32_t verdict = decision.verdict;
    HOLDS((verdict == STARS_ACCEPT || verdict == STARS_FALLBACK) == decided());
    HOLDS(decided() || verdict == (drawn_ && fed_ == drawn_ ? STARS_RETRY : STARS_UNDECIDED));
    HOLDS(progress().verdict == verdict);
  }

  bool accepts(const stars_scored& one, const stars_progress& before, bool& unsure) const {
    const double t = params_.reward_threshold;
    if (one.reward == -kInfinity || t == kInfinity) return false;
    if (t == -kInfinity) return true;
    const double start = params_.alpha == 1.0 ? t : (1.0 - params_.alpha) * params_.prompt_reward + params_.alpha * t;
    const double rising = start + static_cast<double>(before.tokens + one.tokens) / params_.max_tokens * (t - start);
    const double tau = rising < t ? rising : t;
    if (params_.beta == 0.0) return one.reward >= tau;
    const double log_u = std::log(stars_accept_uniform(params_.seed, one.attempt, before.segments, params_.sample));
    const double scaled = (one.reward - tau) / params_.beta;
    if (std::fabs(log_u - scaled) < kClose) unsure = true;
    return log_u < scaled;
  }

  void commit(const stars_progress& before) {
    const int32_t status = stars_controller_commit(controller_);
    HOLDS((status == STARS_OK) == decided());
    if (!came_through(status, before)) return;
    const stars_progress now = progress();
    HOLDS(now.segments == before.segments + 1 && now.tokens > before.tokens);
    HOLDS(now.tokens_drawn >= now.tokens && now.rewards >= before.rewards);
    forget_segment();
  }

  void close() {
    stars_controller* const last = controller_;
    HOLDS(stars_controller_close(last) == STARS_OK && stars_controller_close(last) == STARS_CLOSED);
    HOLDS(stars_controller_commit(last) == STARS_CLOSED && stars_controller_next(last, nullptr, 1) == -STARS_CLOSED);
    HOLDS(stars_ledger_check(reinterpret_cast<stars_ledger*>(last), nullptr) == STARS_CLOSED);
  }

  // What is always refused.
  void wrong(const stars_progress& before) {
    stars_attempt attempts[1];
    stars_scored scored[1] = {{0.5, 1, 1, 0, 0}};
    stars_decision decision = {}, sized = {};
    decision.size = sizeof decision;
    sized.size = bytes_.byte() & 15;
    stars_progress small = {};
    small.size = sizeof small - 8;
    int32_t status = STARS_OK;
    switch (bytes_.below(12)) {
      case 0: status = static_cast<int32_t>(-stars_controller_next(controller_, nullptr, 1)); break;
      case 1: status = static_cast<int32_t>(-stars_controller_next(controller_, attempts, 0)); break;
      case 2: status = static_cast<int32_t>(-stars_controller_next(controller_, attempts, -bytes_.byte())); break;
      case 3: status = static_cast<int32_t>(-stars_controller_next(nullptr, attempts, 1)); break;
      case 4: status = stars_controller_feed(controller_, nullptr, 1, nullptr, &decision); break;
      case 5: status = stars_controller_feed(controller_, scored, -1, nullptr, &decision); break;
      case 6: status = stars_controller_feed(controller_, scored, 1, nullptr, nullptr); break;
      case 7: status = stars_controller_feed(controller_, scored, 1, nullptr, &sized); break;
      case 8: status = stars_controller_progress(controller_, &small); break;
      case 9: status = stars_controller_progress(controller_, nullptr); break;
      case 10: status = stars_controller_close(nullptr); break;
      default: status = stars_controller_open(nullptr) ? STARS_OK : stars_last_status();
    }
    HOLDS(status != STARS_OK && !came_through(status, before));
  }

  fuzz::Bytes& bytes_;
  stars_controller* controller_ = nullptr;
  stars_controller_params params_ = {};
  bool reads_ = false;  // the prompt's reward
  int32_t drawn_ = 0, fed_ = 0, most_ = 0, best_ = 0, winner_ = 0;  // of the segment
  double best_reward_ = 0.0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  ++fuzz::inputs;
  Run(bytes).all();
  if (fuzz::operations >= fuzz::most)
    std::printf("fuzz_controller: %lld attempts decided as the law says, %lld times too close to tell\n",
                static_cast<long long>(decisions), static_cast<long long>(close_calls));
  fuzz::finish("fuzz_controller");
  return 0;
}
