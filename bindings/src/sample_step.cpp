// One draw for every lane; what is drawn is said in kernels/sample_step.py.
//
// Every filter is a threshold on z = logit / temperature, so none needs a full sort, and the noise of a token is only
// computed if the token could still win: noise never exceeds `highest_noise`. Logits are compared with bounds that are
// a little too low, and what passes is divided and tested exactly, so that few logits are divided at all.
#include <cfloat>

#include "ops.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"
#include "selection.h"

namespace stars::STARS_ISA {
namespace {

constexpr float nothing_below = 35.0f;  // exp(-35) times any vocabulary is nothing in float32

// A little below a logit that belongs to z, whichever way the division and the product round.
STARS_INLINE float logit_below(double z, double temperature) {
  const double logit = z * temperature;
  const double lower = logit - __builtin_fabs(logit) * 0x1p-21 - 1e-37;
  return lower > -FLT_MAX ? (lower < FLT_MAX ? (float)lower : FLT_MAX) : -FLT_MAX;
}

// The argmax of z + noise over the tokens with z >= threshold, of those offered. Tokens are offered in blocks of four,
// the blocks of the generator, in rising order; run() ends a series and another may begin anywhere.
class race {
 public:
  STARS_INLINE race(const logit_row& row, float temperature, float threshold, const noise_stream& noise)
      : row(row), temperature(temperature), threshold(threshold), noise(noise) {}

  STARS_INLINE void offer(int32_t block) {
    if (waiting && blocks[waiting - 1] == block) return;
    blocks[waiting++] = block;
    if (waiting == vector_width) run();
  }

  // The logit below which a token cannot win any more.
  STARS_INLINE float lowest_logit() const { return lowest; }

  void run() {
    if (!waiting) return;
    for (int i = waiting; i < vector_width; ++i) blocks[i] = no_block;
    words in_order;
    for (int i = 0; i < vector_width; ++i) ordered[i] = (uint32_t)blocks[block_lane(i)];
    std::memcpy(&in_order, ordered, sizeof in_order);
    words drawn[4];
    words_in_token_order(noise, in_order, drawn);
    for (int part = 0; part < 4; ++part) {
      const int32_t* own = blocks + part * (vector_width / 4);
      if (part * (vector_width / 4) >= waiting) break;
      ints tokens;
      const floats z = scaled(own, tokens);
      const ints kept = (z >= splat(threshold)) & (z > splat(-infinity));
      if (!any(kept & (z + gumbel_bound(drawn[part]) >= splat(leader)))) continue;
      const floats noisy = z + gumbel(drawn[part]);
      const ints better = kept & ((noisy > best) | ((noisy == best) & (tokens < best_token)));
      best = better ? noisy : best;
      best_token = better ? tokens : best_token;
      leader = max_of(best);
    }
    waiting = 0;
    if (leader > -infinity) {
      const double z = (double)leader - highest_noise - __builtin_fabsf(leader) * 0x1p-21;
      const float bound = logit_below(z, temperature);
      lowest = bound > lowest ? bound : lowest;
    }
  }

  // -1 if nothing was kept.
  STARS_INLINE int32_t winner() const {
    const float highest = max_of(best);
    int32_t token = -1;
    for (int i = 0; i < vector_width; ++i)
      if (best[i] == highest && best_token[i] >= 0 && (token < 0 || best_token[i] < token)) token = best_token[i];
    return token;
  }

 private:
  STARS_INLINE static int block_lane(int i) {
    constexpr int quarter = vector_width / 4;
    return i % 4 * quarter + i / 4;
  }

  // z and the token ids of vector_width / 4 blocks.
  STARS_INLINE floats scaled(const int32_t* own, ints& tokens) const {
    constexpr int quarter = vector_width / 4;
    const int64_t first = (int64_t)own[0] * 4;
    floats logits;
    if (own[quarter - 1] == own[0] + quarter - 1 && first >= 0 && first + vector_width <= row.vocab) {  // they rise
      logits = load(row.logits + first);
      tokens = lane_numbers() + (int32_t)first;
    } else {
      for (int i = 0; i < vector_width; ++i) {
        const int64_t token = (int64_t)own[i / 4] * 4 + i % 4;
        logits[i] = token >= 0 && token < row.vocab ? row.logits[token] : -infinity;
        tokens[i] = (int32_t)token;
      }
    }
    return temperature == 1.0f ? logits : logits / splat(temperature);
  }

  static constexpr int32_t no_block = -1;

  const logit_row& row;
  const float temperature, threshold;
  const noise_stream noise;
  float lowest = -FLT_MAX, leader = -infinity;
  floats best = splat(-infinity);
  ints best_token = splat((int32_t)-1);
  int waiting = 0;
  int32_t blocks[vector_width];
  uint32_t ordered[vector_width];
};

struct lane_filters {
  float temperature, top_p, min_p;
  int64_t top_k;
};

// Temperature, filters and noise over a row whose largest logit is finite.
int32_t draw(const logit_row& row, const lane_filters& filters, const noise_stream& noise) {
  const float temperature = filters.temperature;
  const int32_t greedy = first_highest(row);
  if (!(temperature > 0.0f)) return greedy;
  const float highest = row.highest / temperature;
  if (!(__builtin_fabsf(highest) <= FLT_MAX)) return greedy;

  float threshold = -infinity;
  candidate_list found = {};
  if (filters.min_p > 0.0f) threshold = highest + (float)__builtin_log((double)filters.min_p);
  if (filters.top_k > 0 && filters.top_k < row.vocab) {
    const float kth = kth_largest(row, filters.top_k, found);
    const float scaled = kth / temperature;
    threshold = scaled > threshold ? scaled : threshold;
  }
  if (filters.top_p < 1.0f) {
    const float lowest = highest - top_p_reach > threshold ? highest - top_p_reach : threshold;
    if (!found.values) found = collect(row, logit_below(lowest, temperature));
    threshold = top_p_threshold(found, temperature, highest, threshold, filters.top_p);
  }

  race runners(row, temperature, threshold, noise);
  const float lowest = threshold > -infinity ? logit_below(threshold, temperature) : -FLT_MAX;
  if (found.values && found.count < row.vocab / 8) {
    for (int64_t i = 0; i < found.count; ++i)
      if (found.values[i] >= lowest) runners.offer(found.tokens[i] / 4);
  } else {
    runners.offer(greedy / 4);  // a good runner first, so that few others have to run
    runners.run();
    for_blocks(row, [&](const floats& block_highest, int64_t first, int64_t end) {
      const float own = runners.lowest_logit();
      const floats bound = splat(own > lowest ? own : lowest);
      if (!any(block_highest >= bound)) return;
      for (int64_t i = first; i < end; i += vector_width) {
        uint32_t bits = mask_bits(row.at(i) >= bound);
        bits = (bits | bits >> 1 | bits >> 2 | bits >> 3) & 0x11111111u;
        for (; bits; bits &= bits - 1) runners.offer((int32_t)((i + __builtin_ctz(bits)) / 4));
      }
    });
  }
  runners.run();
  const int32_t winner = runners.winner();
  return winner >= 0 ? winner : greedy;
}

void step_lane(const stars_sample_step_params& p, int64_t lane) {
  if (p.done[lane]) return;
  const int32_t step = p.steps[lane];
  if (step < 0 || step >= p.max_steps) {  // no column is left to write to
    p.done[lane] = 1;
    return;
  }
  thread_local scratch maxima_memory;
  logit_row row = {p.logits + lane * p.vocab, p.vocab, nullptr, 0.0f};
  row.maxima = maxima_memory.take<float>(maxima_count(p.vocab));
  int32_t token = -1;
  float logprob = __builtin_nanf("");
  const bool numbers = find_maxima(row);
  if (numbers && row.highest == -infinity) logprob = -infinity;
  if (numbers && row.highest > -infinity) {
    const noise_stream noise = {(uint64_t)p.seeds[lane], (uint32_t)step, (uint32_t)p.attempts[lane],
                                (uint32_t)p.streams[lane]};
    double sum = 0.0;
    bool cut = false;
    const bool may_be_cut = p.entropy_cut && p.entropy_cut[lane] < infinity && step >= p.least_tokens[lane];
    const auto halves = [&](int64_t half) {  // neither needs the other
      if (half == 0) {
        token = draw(row, {p.temperature[lane], p.top_p[lane], p.min_p[lane], p.top_k[lane]}, noise);
      } else if (may_be_cut) {
        const exponential_sums sums = sums_for_entropy(row, nothing_below);
        sum = sums.mass;
        cut = sums.entropy() >= (double)p.entropy_cut[lane];
      } else {
        sum = sum_of_exponentials(row, nothing_below);
      }
    };
    if (p.lanes == 1) {
      parallel(2, halves);
    } else {
      halves(1);
      if (!cut) halves(0);
    }
    if (cut) {
      p.done[lane] = 1;
      return;
    }
    logprob = (float)((double)row.logits[token] - row.highest - __builtin_log(sum));
  }
  p.out_tokens[lane * p.max_steps + step] = token;
  p.out_logprobs[lane * p.max_steps + step] = logprob;
  p.steps[lane] = step + 1;
  bool ended = token < 0 || step + 1 >= p.max_tokens[lane];
  for (int64_t i = 0; i < p.max_stop_ids; ++i) ended |= p.stop_ids[lane * p.max_stop_ids + i] == token;
  if (ended) {
    p.done[lane] = 1;
    return;
  }
  p.token_ids[lane] = token;
  ++p.positions[lane];
  ++p.slots[lane];
  ++p.slab_used[lane];
}

}  // namespace

void sample_step(const stars_sample_step_params& p) {
  if (p.lanes == 1) return step_lane(p, 0);
  parallel(p.lanes, [&](int64_t lane) { step_lane(p, lane); });
}

void gumbel_noise(uint64_t seed, uint32_t position, uint32_t attempt, uint32_t stream, int64_t vocab, float* out);

void gumbel_noise(uint64_t seed, uint32_t position, uint32_t attempt, uint32_t stream, int64_t vocab, float* out) {
  const noise_stream noise = {seed, position, attempt, stream};
  for (int64_t first = 0; first < vocab; first += 4 * vector_width) {
    words drawn[4];
    words_in_token_order(noise, bits_as<words>(block_order()) + (uint32_t)(first / 4), drawn);
    for (int part = 0; part < 4; ++part) {
      const int64_t at = first + part * vector_width, left = vocab - at;
      if (left > 0) store_first(out + at, gumbel(drawn[part]), left < vector_width ? left : vector_width);
    }
  }
}

}  // namespace stars::STARS_ISA
