// llama.cpp drafts, a toy reward scores, the segment controller of stars.h decides: two libraries and no Python.
//
//   llama_stars MODEL.gguf [prompt] [width] [seed] [max_tokens]
//
// Candidates are sequences of one unified KV cache. Sequence 0 is the history; each lane shares its cells, so that
// rejecting a candidate takes its own cells away, and committing one gives its cells to all. The same seed gives the
// same text at any width, but for what the order of sums in llama.cpp's products does to the last bits of logits.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "llama.h"
#include "stars.h"

namespace {

constexpr int32_t SEGMENT = 8, MAX_ATTEMPTS = 6;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

void check(int32_t status) {
  if (status != STARS_OK) fail(stars_last_error());
}

// A struct of stars.h that knows its size.
template <class T>
T sized() {
  T made = {};
  made.size = sizeof made;
  return made;
}

template <auto Free>
struct freed {
  template <class T>
  void operator()(T* one) const {
    Free(one);
  }
};
using model_ptr = std::unique_ptr<llama_model, freed<llama_model_free>>;
using context_ptr = std::unique_ptr<llama_context, freed<llama_free>>;
using controller_ptr = std::unique_ptr<stars_controller, freed<stars_controller_close>>;
using tokens = std::vector<llama_token>;

// The model, its one context, and what is run.
class runner {
 public:
  runner(const char* path, int32_t lanes, int32_t max_tokens, const std::string& prompt) {
    llama_model_params given = llama_model_default_params();
    model_.reset(llama_model_load_from_file(path, given));
    if (!model_) fail(std::string("llama.cpp cannot load ") + path);
    if (llama_model_is_recurrent(model_.get()) || llama_model_is_hybrid(model_.get()))
      fail("this model is recurrent: its state cannot be cut, so that no candidate can be rejected");
    if (llama_model_n_swa(model_.get()) > 0)
      fail("this model has sliding windows, which the example leaves out: stars.adapters.llama_cpp has them");
    vocab_ = llama_model_get_vocab(model_.get());
    vocab_size = llama_vocab_n_tokens(vocab_);
    history = tokenised(prompt);
    llama_context_params settings = llama_context_default_params();
    settings.n_seq_max = static_cast<uint32_t>(lanes + 1);
    settings.n_ctx = static_cast<uint32_t>(history.size()) + static_cast<uint32_t>(max_tokens + lanes * SEGMENT);
    settings.kv_unified = true;
    settings.no_perf = true;
    context_.reset(llama_init_from_model(model_.get(), settings));
    if (!context_) fail("llama.cpp has no memory for a context");
    memory_ = llama_get_memory(context_.get());
    room_ = static_cast<int32_t>(llama_n_batch(context_.get()));
    batch_ = llama_batch_init(room_, 0, lanes + 1);
  }
  ~runner() { llama_batch_free(batch_); }
  runner(const runner&) = delete;
  runner& operator=(const runner&) = delete;

  // Adds a token of the next pass. It becomes that of all `sequences`, which end before it.
  void add(llama_token token, int32_t position, const std::vector<llama_seq_id>& sequences, bool wanted) {
    const int32_t row = batch_.n_tokens++;
    batch_.token[row] = token;
    batch_.pos[row] = position;
    batch_.logits[row] = wanted;
    batch_.n_seq_id[row] = static_cast<int32_t>(sequences.size());
    for (size_t place = 0; place < sequences.size(); ++place) batch_.seq_id[row][place] = sequences[place];
    if (batch_.n_tokens == room_ && !wanted) run();
  }

  // Runs what was added: the logits of the wanted rows, in their order, until the next pass.
  const float* run() {
    rows += batch_.n_tokens;
    const int32_t status = llama_decode(context_.get(), batch_);
    batch_.n_tokens = 0;
    if (status != 0) fail("llama_decode gave " + std::to_string(status));
    return llama_get_logits(context_.get());
  }

  void fork(llama_seq_id from, llama_seq_id to, int32_t begin) { llama_memory_seq_cp(memory_, from, to, begin, -1); }
  void cut(llama_seq_id sequence, int32_t begin) { llama_memory_seq_rm(memory_, sequence, begin, -1); }
  bool ends(llama_token token) const { return llama_vocab_is_eog(vocab_, token); }

  std::string text(const tokens& ids) const {
    std::string made(64 + 16 * ids.size(), '\0');
    for (;;) {
      const int32_t count = llama_detokenize(vocab_, ids.data(), static_cast<int32_t>(ids.size()), made.data(),
                                             static_cast<int32_t>(made.size()), false, false);
      made.resize(static_cast<size_t>(std::abs(count)));
      if (count >= 0) return made;
    }
  }

  tokens history;  // prompt and response
  int32_t vocab_size = 0;
  int64_t rows = 0;  // of forward passes

 private:
  tokens tokenised(const std::string& prompt) const {
    tokens made(prompt.size() + 8);
    const int32_t count = llama_tokenize(vocab_, prompt.data(), static_cast<int32_t>(prompt.size()), made.data(),
                                         static_cast<int32_t>(made.size()), true, true);
    if (count <= 0) fail("the tokenizer makes nothing of this prompt");
    made.resize(static_cast<size_t>(count));
    return made;
  }

  model_ptr model_;
  context_ptr context_;
  const llama_vocab* vocab_ = nullptr;
  llama_memory_t memory_ = nullptr;
  llama_batch batch_ = {};
  int32_t room_ = 0;
};

// Prefers short words: minus the mean of their letters, of the whole response.
double reward_of(const std::string& response) {
  int letters = 0, words = 0;
  bool inside = false;
  for (const char one : response) {
    const bool letter = one != ' ' && one != '\n';
    letters += letter;
    words += letter && !inside;
    inside = letter;
  }
  return words ? -static_cast<double>(letters) / words : -4.0;
}

// What an attempt has drawn, and the lane that holds it.
struct drafted {
  tokens ids;
  llama_seq_id lane;
};

// Draws a token of every attempt at a time from logits, with the attempts' own random numbers.
class sampler {
 public:
  explicit sampler(const std::vector<stars_attempt>& attempts, int32_t vocab)
      : logits(attempts.size() * static_cast<size_t>(vocab)), out_(attempts.size() * SEGMENT, -1),
        logprobs_(attempts.size() * SEGMENT), counters_(4 * attempts.size()), steps_(attempts.size()),
        done_(attempts.size()), no_stop_(attempts.size(), -1), top_k_(attempts.size(), 40),
        temperature_(attempts.size(), 0.8f), top_p_(attempts.size(), 1.0f), min_p_(attempts.size(), 0.0f) {
    for (const stars_attempt& one : attempts) {
      seeds_.push_back(static_cast<int64_t>(one.seed));
      numbers_.push_back(one.attempt);
      streams_.push_back(one.stream);
      most_.push_back(one.max_tokens);
    }
    step_.logits = logits.data();
    step_.token_ids = counters_.data();
    step_.positions = counters_.data() + attempts.size();
    step_.slots = counters_.data() + 2 * attempts.size();
    step_.slab_used = counters_.data() + 3 * attempts.size();
    step_.steps = steps_.data();
    step_.max_tokens = most_.data();
    step_.done = done_.data();
    step_.out_tokens = out_.data();
    step_.out_logprobs = logprobs_.data();
    step_.seeds = seeds_.data();
    step_.attempts = numbers_.data();
    step_.streams = streams_.data();
    step_.temperature = temperature_.data();
    step_.top_k = top_k_.data();
    step_.top_p = top_p_.data();
    step_.min_p = min_p_.data();
    step_.stop_ids = no_stop_.data();  // which tokens end a text llama.cpp says
    step_.lanes = static_cast<int64_t>(attempts.size());
    step_.vocab = vocab;
    step_.max_steps = SEGMENT;
    step_.max_stop_ids = 1;
  }
  sampler(const sampler&) = delete;  // the struct points into the vectors
  sampler& operator=(const sampler&) = delete;

  // Draws from `logits`; rows of attempts that are done are not read.
  void draw() { check(stars_call(STARS_OP_SAMPLE_STEP, &step_)); }
  void end(size_t lane) { done_[lane] = 1; }
  bool done(size_t lane) const { return done_[lane] != 0; }
  tokens drawn(size_t lane) const {
    const auto begin = out_.begin() + static_cast<std::ptrdiff_t>(lane * SEGMENT);
    return {begin, begin + steps_[lane]};
  }

  std::vector<float> logits;  // [attempts, vocab]

 private:
  tokens out_;
  std::vector<float> logprobs_;
  std::vector<int32_t> counters_, steps_, done_, no_stop_, top_k_, most_, numbers_, streams_;
  std::vector<float> temperature_, top_p_, min_p_;
  std::vector<int64_t> seeds_;
  stars_sample_step_params step_ = sized<stars_sample_step_params>();
};

// Drafts an attempt in each of the `free` lanes; `first` are the logits behind the history.
std::vector<drafted> draft(runner& lm, const std::vector<stars_attempt>& attempts, const std::vector<float>& first,
                           const std::vector<llama_seq_id>& free) {
  sampler lanes(attempts, lm.vocab_size);
  const auto row = [&](size_t lane) { return lanes.logits.begin() + static_cast<std::ptrdiff_t>(lane * first.size()); };
  for (size_t lane = 0; lane < attempts.size(); ++lane) std::copy(first.begin(), first.end(), row(lane));
  for (int32_t position = static_cast<int32_t>(lm.history.size());; ++position) {
    lanes.draw();
    std::vector<size_t> active;
    for (size_t lane = 0; lane < attempts.size(); ++lane) {
      const llama_token token = lanes.drawn(lane).back();
      if (token < 0) fail("the model's logits are NaN");
      if (lm.ends(token)) lanes.end(lane);
      if (lanes.done(lane)) continue;
      active.push_back(lane);
      lm.add(token, position, {free[lane]}, true);
    }
    if (active.empty()) break;
    const float* found = lm.run();
    for (const size_t lane : active) {
      std::copy(found, found + first.size(), row(lane));
      found += first.size();
    }
  }
  std::vector<drafted> made;
  for (size_t lane = 0; lane < attempts.size(); ++lane) made.push_back({lanes.drawn(lane), free[lane]});
  return made;
}

controller_ptr opened(uint64_t seed, int32_t max_tokens) {
  auto params = sized<stars_controller_params>();
  params.seed = seed;
  params.reward_threshold = -3.5;
  params.beta = 0.3;
  params.alpha = 1.0;
  params.max_tokens = max_tokens;
  params.segment_size = SEGMENT;
  params.max_attempts = MAX_ATTEMPTS;
  controller_ptr made(stars_controller_open(&params));
  if (!made) fail(stars_last_error());
  return made;
}

// One response: its lanes in llama.cpp, and its controller.
class response {
 public:
  response(runner& lm, int32_t width, uint64_t seed, int32_t max_tokens)
      : lm_(lm), controller_(opened(seed, max_tokens)), attempts_(static_cast<size_t>(width)) {
    for (int32_t lane = 0; lane <= width + 1; ++lane) all_.push_back(lane);  // the history, lanes, one that is held
    for (size_t place = 0; place + 1 < lm.history.size(); ++place)
      lm.add(lm.history[place], static_cast<int32_t>(place), {0}, false);
    if (lm.history.size() > 1) lm.run();
    for (const llama_seq_id lane : all_)
      if (lane) lm.fork(0, lane, 0);
  }

  // Drafts, scores and decides once; false: the response has ended.
  bool round() {
    const int64_t count =
        stars_controller_next(controller_.get(), attempts_.data(), static_cast<int64_t>(attempts_.size()));
    if (count < 0) fail(stars_last_error());
    if (count == 0) return false;
    const std::vector<stars_attempt> asked(attempts_.begin(), attempts_.begin() + count);
    const stars_decision decision = decide(asked);
    const bool decided = decision.verdict == STARS_ACCEPT || decision.verdict == STARS_FALLBACK;
    forget_all_but(decided ? decision.winner : decision.best);
    if (decided) commit(decision);
    return true;
  }

  const tokens& ids() const { return ids_; }
  stars_progress progress() const {
    auto made = sized<stars_progress>();
    check(stars_controller_progress(controller_.get(), &made));
    return made;
  }

 private:
  int32_t end() const { return static_cast<int32_t>(lm_.history.size()); }

  stars_decision decide(const std::vector<stars_attempt>& asked) {
    if (ahead_.empty()) {
      lm_.add(lm_.history.back(), end() - 1, all_, true);  // once for all lanes
      const float* row = lm_.run();
      ahead_.assign(row, row + lm_.vocab_size);
    }
    std::vector<llama_seq_id> free;
    for (const llama_seq_id lane : all_)
      if (lane && (drafts_.empty() || drafts_.begin()->second.lane != lane)) free.push_back(lane);
    std::vector<drafted> made = draft(lm_, asked, ahead_, free);
    std::vector<stars_scored> scored;
    for (size_t place = 0; place < made.size(); ++place) {
      tokens whole = ids_;
      whole.insert(whole.end(), made[place].ids.begin(), made[place].ids.end());
      scored.push_back({reward_of(lm_.text(whole)), asked[place].attempt, static_cast<int32_t>(made[place].ids.size()),
                        lm_.ends(made[place].ids.back()), 0});
      drafts_[asked[place].attempt] = std::move(made[place]);
    }
    auto decision = sized<stars_decision>();
    check(stars_controller_feed(controller_.get(), scored.data(), static_cast<int64_t>(scored.size()), nullptr,
                                &decision));
    return decision;
  }

  // Rejected: each loses its own cells.
  void forget_all_but(int32_t kept) {
    for (auto one = drafts_.begin(); one != drafts_.end();) {
      if (one->first == kept) {
        ++one;
        continue;
      }
      lm_.cut(one->second.lane, end());
      one = drafts_.erase(one);
    }
  }

  void commit(const stars_decision& decision) {
    const drafted winner = drafts_.at(decision.winner);
    drafts_.clear();
    for (const llama_seq_id lane : all_)
      if (lane != winner.lane) lm_.fork(winner.lane, lane, end());
    lm_.history.insert(lm_.history.end(), winner.ids.begin(), winner.ids.end());
    ids_.insert(ids_.end(), winner.ids.begin(), winner.ids.end());
    ahead_.clear();
    check(stars_controller_commit(controller_.get()));
    std::printf("[attempt %d%s, reward %.2f] %s\n", static_cast<int>(decision.winner),
                decision.verdict == STARS_ACCEPT ? "" : ", the best of all that were rejected",
                reward_of(lm_.text(ids_)), lm_.text(winner.ids).c_str());
  }

  runner& lm_;
  controller_ptr controller_;
  std::vector<stars_attempt> attempts_;  // room for a round's
  std::vector<llama_seq_id> all_;
  tokens ids_;  // committed
  std::vector<float> ahead_;  // logits behind the history; empty: its last token was not run yet
  std::map<int32_t, drafted> drafts_;  // of this segment, by attempt: those of this round, and the one that is held
};

void respond(const char* path, const std::string& prompt, int32_t width, uint64_t seed, int32_t max_tokens) {
  runner lm(path, width + 1, max_tokens, prompt);
  response made(lm, width, seed, max_tokens);
  while (made.round()) {
  }
  const stars_progress progress = made.progress();
  std::printf("%s\n%lld tokens kept of %lld drawn, %lld rows run, prompt included\n", lm.text(made.ids()).c_str(),
              static_cast<long long>(progress.tokens), static_cast<long long>(progress.tokens_drawn),
              static_cast<long long>(lm.rows));
}

}  // namespace

int main(int count, char** given) {
  if (count < 2) {
    std::fprintf(stderr, "usage: llama_stars MODEL.gguf [prompt] [width] [seed] [max_tokens]\n");
    return 2;
  }
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  int status = 0;
  try {
    const std::string prompt = count > 2 ? given[2] : "Once upon a time";
    const int32_t width = count > 3 ? std::atoi(given[3]) : 3;
    check(stars_check_version(STARS_ABI_VERSION));
    if (width < 1 || width > 64) fail("width is 1 to 64");
    respond(given[1], prompt, width, count > 4 ? std::strtoull(given[4], nullptr, 10) : 7,
            count > 5 ? std::atoi(given[5]) : 40);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    status = 1;
  }
  llama_backend_free();
  return status;
}
