// llama.cpp drafts, a toy reward scores, the segment controller of stars.h decides: two libraries and no Python.
//
//   llama_stars MODEL.gguf [prompt] [width] [seed] [max_tokens]
//
// Candidates are sequences of one unified KV cache. Sequence 0 is the history; each lane shares its cells, so that
// rejecting a candidate takes its own cells away, and committing one gives its cells to all. The same seed gives the
// same text at any width, but for what the order of sums in llama.cpp's products does to the last bits of logits.
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

// Draws one token of each lane at a time; `first` are the logits behind the history.
std::vector<drafted> draft(runner& lm, const std::vector<stars_attempt>& attempts, const std::vector<float>& first,
                           const std::vector<llama_seq_id>& free) {
  const size_t count = attempts.size(), vocab = static_cast<size_t>(lm.vocab_size);
  std::vector<int32_t> zero(4 * count), steps(count), done(count), most, numbers, streams, tokens_(count * SEGMENT, -1);
  std::vector<int32_t> no_stop(count, -1), top_k(count, 40);
  std::vector<int64_t> seeds;
  std::vector<float> logprobs(count * SEGMENT), temperature(count, 0.8f), top_p(count, 1.0f), min_p(count, 0.0f);
  for (const stars_attempt& one : attempts) {
    seeds.push_back(static_cast<int64_t>(one.seed));
    numbers.push_back(one.attempt);
    streams.push_back(one.stream);
    most.push_back(one.max_tokens);
  }
  std::vector<float> logits(count * vocab);
  for (size_t lane = 0; lane < count; ++lane)
    std::copy(first.begin(), first.end(), logits.begin() + static_cast<std::ptrdiff_t>(lane * vocab));
  auto step = sized<stars_sample_step_params>();
  step.logits = logits.data();
  step.token_ids = zero.data();
  step.positions = zero.data() + count;
  step.slots = zero.data() + 2 * count;
  step.slab_used = zero.data() + 3 * count;
  step.steps = steps.data();
  step.max_tokens = most.data();
  step.done = done.data();
  step.out_tokens = tokens_.data();
  step.out_logprobs = logprobs.data();
  step.seeds = seeds.data();
  step.attempts = numbers.data();
  step.streams = streams.data();
  step.temperature = temperature.data();
  step.top_k = top_k.data();
  step.top_p = top_p.data();
  step.min_p = min_p.data();
  step.stop_ids = no_stop.data();
  step.lanes = static_cast<int64_t>(count);
  step.vocab = lm.vocab_size;
  step.max_steps = SEGMENT;
  step.max_stop_ids = 1;
  for (int32_t position = static_cast<int32_t>(lm.history.size());; ++position) {
    check(stars_call(STARS_OP_SAMPLE_STEP, &step));
    std::vector<size_t> active;
    for (size_t lane = 0; lane < count; ++lane) {
      const int32_t token = tokens_[lane * SEGMENT + static_cast<size_t>(steps[lane]) - 1];
      if (token < 0) fail("the model's logits are NaN");
      if (lm.ends(token)) done[lane] = 1;
      if (!done[lane]) active.push_back(lane);
    }
    if (active.empty()) break;
    for (const size_t lane : active) lm.add(step.token_ids[lane], position, {free[lane]}, true);
    const float* found = lm.run();
    for (const size_t lane : active) {
      std::copy(found, found + vocab, logits.begin() + static_cast<std::ptrdiff_t>(lane * vocab));
      found += vocab;
    }
  }
  std::vector<drafted> made;
  for (size_t lane = 0; lane < count; ++lane) {
    const auto begin = tokens_.begin() + static_cast<std::ptrdiff_t>(lane * SEGMENT);
    made.push_back({tokens(begin, begin + steps[lane]), free[lane]});
  }
  return made;
}

void respond(const char* path, const std::string& prompt, int32_t width, uint64_t seed, int32_t max_tokens) {
  auto params = sized<stars_controller_params>();
  params.seed = seed;
  params.reward_threshold = -3.5;
  params.beta = 0.3;
  params.alpha = 1.0;
  params.max_tokens = max_tokens;
  params.segment_size = SEGMENT;
  params.max_attempts = MAX_ATTEMPTS;
  const controller_ptr controller(stars_controller_open(&params));
  if (!controller) fail(stars_last_error());

  const int32_t lanes = width + 1;  // one may hold the best so far while others are drawn
  runner lm(path, lanes, max_tokens, prompt);
  std::vector<llama_seq_id> all = {0};
  for (int32_t lane = 1; lane <= lanes; ++lane) all.push_back(lane);
  for (size_t place = 0; place + 1 < lm.history.size(); ++place)
    lm.add(lm.history[place], static_cast<int32_t>(place), {0}, false);
  if (lm.history.size() > 1) lm.run();
  for (int32_t lane = 1; lane <= lanes; ++lane) lm.fork(0, lane, 0);

  tokens response;
  std::vector<float> logits;  // behind the history; empty: its last token was not run yet
  std::map<int32_t, drafted> drafts;  // of this segment, by attempt: those of this round, and the one that is held
  std::vector<stars_attempt> attempts(static_cast<size_t>(width));
  for (;;) {
    const int64_t count = stars_controller_next(controller.get(), attempts.data(), width);
    if (count < 0) fail(stars_last_error());
    if (count == 0) break;
    const int32_t end = static_cast<int32_t>(lm.history.size());
    if (logits.empty()) {
      lm.add(lm.history.back(), end - 1, all, true);  // once for all lanes
      const float* row = lm.run();
      logits.assign(row, row + lm.vocab_size);
    }
    std::vector<llama_seq_id> free;
    for (int32_t lane = 1; lane <= lanes; ++lane)
      if (drafts.empty() || drafts.begin()->second.lane != lane) free.push_back(lane);
    const std::vector<stars_attempt> asked(attempts.begin(), attempts.begin() + count);
    std::vector<drafted> made = draft(lm, asked, logits, free);
    std::vector<stars_scored> scored;
    for (size_t place = 0; place < made.size(); ++place) {
      tokens whole = response;
      whole.insert(whole.end(), made[place].ids.begin(), made[place].ids.end());
      scored.push_back({reward_of(lm.text(whole)), asked[place].attempt, static_cast<int32_t>(made[place].ids.size()),
                        lm.ends(made[place].ids.back()), 0});
      drafts[asked[place].attempt] = std::move(made[place]);
    }
    auto decision = sized<stars_decision>();
    check(stars_controller_feed(controller.get(), scored.data(), count, nullptr, &decision));
    const bool decided = decision.verdict == STARS_ACCEPT || decision.verdict == STARS_FALLBACK;
    const int32_t kept = decided ? decision.winner : decision.best;
    for (auto one = drafts.begin(); one != drafts.end();) {  // rejected: each loses its own cells
      if (one->first == kept) {
        ++one;
        continue;
      }
      lm.cut(one->second.lane, end);
      one = drafts.erase(one);
    }
    if (!decided) continue;
    const drafted winner = drafts.at(kept);
    drafts.clear();
    for (int32_t lane = 0; lane <= lanes; ++lane)
      if (lane != winner.lane) lm.fork(winner.lane, lane, end);
    lm.history.insert(lm.history.end(), winner.ids.begin(), winner.ids.end());
    response.insert(response.end(), winner.ids.begin(), winner.ids.end());
    logits.clear();
    check(stars_controller_commit(controller.get()));
    std::printf("[attempt %d%s, reward %.2f] %s\n", static_cast<int>(decision.winner),
                decision.verdict == STARS_ACCEPT ? "" : ", the best of all that were rejected",
                reward_of(lm.text(response)), lm.text(winner.ids).c_str());
  }
  auto progress = sized<stars_progress>();
  check(stars_controller_progress(controller.get(), &progress));
  std::printf("%s\n%lld tokens kept of %lld drawn, %lld rows run, prompt included\n", lm.text(response).c_str(),
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
