// The law of acceptance, as engine/rules.py has it; compiled so that nothing is fused, and with the logarithm that Python
// takes: the verdict must be the same.
#include <cmath>
#include <limits>

#include "ops.h"

namespace stars {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

double threshold(int32_t tokens, int32_t max_tokens, double start, double reward_threshold) {
  if (!std::isfinite(reward_threshold)) return reward_threshold;
  const double rising = start + static_cast<double>(tokens) / max_tokens * (reward_threshold - start);
  return rising < reward_threshold ? rising : reward_threshold;  // Python's min: the threshold where one is NaN
}

bool accepts(double uniform, double reward, double tau, double beta) {
  if (reward == -infinity || tau == infinity) return false;
  if (tau == -infinity) return true;
  if (beta == 0.0) return reward >= tau;
  return std::log(uniform) < (reward - tau) / beta;
}

}  // namespace

void decide(const stars_decide_params& p) {
  for (int64_t lane = 0; lane < p.lanes; ++lane) {
    const uint32_t stream = static_cast<uint32_t>(p.streams[lane]);
    const uint32_t attempt = static_cast<uint32_t>(p.attempts[lane]);
    const double uniform =
        stars_accept_uniform(static_cast<uint64_t>(p.seeds[lane]), attempt, stream & 0xFFFFF, stream >> 20);
    const double tau = threshold(p.tokens[lane], p.max_tokens[lane], p.start[lane], p.reward_threshold[lane]);
    const double reward = p.rewards[lane];
    p.accepted[lane] = reward < infinity && accepts(uniform, reward, tau, p.beta[lane]);  // not where it is NaN
  }
}

}  // namespace stars
