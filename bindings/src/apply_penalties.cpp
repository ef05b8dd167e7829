// Penalties on what was said already, as kernels/apply_penalties.py has them.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

struct penalty {
  double repetition, frequency, presence;

  // Formed in double and rounded once; the product with a count is exact, so fusing it changes nothing.
  float operator()(float logit, int64_t count) const {
    const double z = logit;
    const double scaled = z > 0.0 ? z / repetition : z * repetition;
    return static_cast<float>(scaled - frequency * static_cast<double>(count) - (count > 0 ? presence : 0.0));
  }
};

void penalise_lane(const stars_apply_penalties_params& p, int64_t lane) {
  if (p.done[lane]) return;
  const penalty by = {p.repetition[lane], p.frequency[lane], p.presence[lane]};
  if (by.repetition == 1.0 && by.frequency == 0.0 && by.presence == 0.0) return;
  float* const row = p.logits + lane * p.vocab;
  const auto change = [&](int64_t token, int64_t count) {
    if (token >= 0 && token < p.vocab) row[token] = by(row[token], count);
  };

  thread_local std::vector<int32_t> drawn;  // keeps its room: a replayed step allocates nothing
  const int32_t* const first = p.out_tokens + lane * p.max_steps;
  drawn.assign(first, first + std::clamp<int64_t>(p.steps[lane], 0, p.max_steps));
  std::sort(drawn.begin(), drawn.end());

  // Two lists in rising order, merged: each token is changed once, by its count in both.
  int64_t entry = std::clamp<int64_t>(p.start[lane], 0, p.entries);
  const int64_t end = std::clamp<int64_t>(entry + p.count[lane], entry, p.entries);
  for (size_t at = 0; at < drawn.size();) {
    const int32_t token = drawn[at];
    int64_t count = 0;
    for (; at < drawn.size() && drawn[at] == token; ++at) ++count;
    for (; entry < end && p.history[2 * entry] < token; ++entry) change(p.history[2 * entry], p.history[2 * entry + 1]);
    if (entry < end && p.history[2 * entry] == token) count += p.history[2 * entry++ + 1];
    change(token, count);
  }
  for (; entry < end; ++entry) change(p.history[2 * entry], p.history[2 * entry + 1]);
}

}  // namespace

void apply_penalties(const stars_apply_penalties_params& p) {
  parallel(p.lanes, [&](int64_t lane) { penalise_lane(p, lane); });
}

}  // namespace stars
