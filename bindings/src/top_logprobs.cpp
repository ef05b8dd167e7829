// What stood beside the tokens that were drawn, as kernels/top_logprobs.py has it.
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "selection.h"

namespace stars::STARS_ISA {
namespace {

constexpr float nothing_below = 35.0f;  // as sample_step's: what both say of a token has the same bits

// The place of a token among all, from 1: after the larger logits, and the equal ones of lower ids.
int32_t rank_of(const logit_row& row, int32_t token) {
  const float own = row.logits[token];
  const floats bound = splat(own);
  ints before = {};
  for_blocks(row, [&](const floats& block_highest, int64_t first, int64_t end) {
    if (!any(block_highest >= bound)) return;
    for (int64_t i = first; i < end; i += vector_width) {
      const floats v = row.at(i);
      const ints lower = lane_numbers() < splat((int32_t)(token > i ? token - i : 0));
      before -= (v > bound) | ((v == bound) & lower);
    }
  });
  int32_t total = 1;
  for (int i = 0; i < vector_width; ++i) total += before[i];
  return total;
}

// The `wanted` largest logits in order, of equal ones the lowest ids first; how many there are, -inf left out.
int64_t largest_in_order(const logit_row& row, int64_t wanted, int32_t* tokens) {
  candidate_list found = {};
  const float least = kth_largest(row, wanted < row.vocab ? wanted : row.vocab, found);
  int64_t count = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    const float value = found.values[i];
    const auto behind = [&](int64_t place) { return row.logits[tokens[place]] < value; };  // ids rise: equal ones stay
    if (!(value >= least) || value == -infinity || (count == wanted && !behind(count - 1))) continue;
    int64_t at = count < wanted ? count++ : count - 1;
    for (; at > 0 && behind(at - 1); --at) tokens[at] = tokens[at - 1];
    tokens[at] = found.tokens[i];
  }
  return count;
}

void tell_lane(const stars_top_logprobs_params& p, int64_t lane) {
  const int32_t step = p.steps[lane] - 1;
  if (p.wanted[lane] < 0 || step < p.told[lane] || step < 0 || step >= p.max_steps) return;
  thread_local scratch maxima_memory;
  logit_row row = {p.logits + lane * p.vocab, p.vocab, nullptr, 0.0f};
  row.maxima = maxima_memory.take<float>(maxima_count(p.vocab));  // before anything is written
  p.told[lane] = step + 1;
  const int64_t place = lane * p.max_steps + step;
  const int64_t wanted = p.wanted[lane] < p.most ? p.wanted[lane] : p.most;
  const int32_t token = p.tokens[place];
  int32_t* const tokens = p.token_ids + place * p.most;
  float* const logprobs = p.logprobs + place * p.most;
  p.ranks[place] = 0;
  if (p.own) p.own[place] = __builtin_nanf("");
  for (int64_t i = 0; i < p.most; ++i) {
    tokens[i] = -1;
    logprobs[i] = -infinity;
  }
  if (token < 0 || token >= p.vocab || !find_maxima(row) || !(row.highest > -infinity)) return;
  p.ranks[place] = rank_of(row, token);
  if (!wanted && !p.own) return;
  const double total = __builtin_log(sum_of_exponentials(row, nothing_below));
  const auto logprob = [&](int32_t of) { return (float)((double)row.logits[of] - row.highest - total); };
  if (p.own) p.own[place] = logprob(token);
  if (!wanted) return;
  const int64_t count = largest_in_order(row, wanted, tokens);
  for (int64_t i = 0; i < count; ++i) logprobs[i] = logprob(tokens[i]);
}

}  // namespace

void top_logprobs(const stars_top_logprobs_params& p) {
  parallel(p.lanes, [&](int64_t lane) { tell_lane(p, lane); });
}

}  // namespace stars::STARS_ISA
