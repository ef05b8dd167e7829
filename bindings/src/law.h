// The law of acceptance, as engine/rules.py has it. Sources that include this are compiled so that nothing is fused, and
// take the logarithm that Python takes: the verdict must be the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace stars::law {

constexpr double infinity = std::numeric_limits<double>::infinity();

// r0 = (1 - alpha) r(x) + alpha t. With alpha = 1 the prompt's reward is not read.
inline double threshold_start(double prompt_reward, double alpha, double reward_threshold) {
  return alpha == 1.0 ? reward_threshold : (1.0 - alpha) * prompt_reward + alpha * reward_threshold;
}

// tau(n) = min(t, r0 + n / N (t - r0)).
inline double threshold(int64_t tokens, int64_t max_tokens, double start, double reward_threshold) {
  if (!std::isfinite(reward_threshold)) return reward_threshold;
  const double rising =
      start + static_cast<double>(tokens) / static_cast<double>(max_tokens) * (reward_threshold - start);
  return rising < reward_threshold ? rising : reward_threshold;  // Python's min: the threshold where one is NaN
}

// log u < (r - tau) / beta; beta = 0 is the hard rule r >= tau.
inline bool accepts(double uniform, double reward, double tau, double beta) {
  if (reward == -infinity || tau == infinity) return false;
  if (tau == -infinity) return true;
  if (beta == 0.0) return reward >= tau;
  return std::log(uniform) < (reward - tau) / beta;
}

// min(1, exp((r - tau) / beta)), with the edges of `accepts`.
inline double accept_probability(double reward, double tau, double beta) {
  if (reward == -infinity || tau == infinity) return 0.0;
  if (tau == -infinity) return 1.0;
  if (beta == 0.0) return reward >= tau ? 1.0 : 0.0;
  const double tilt = (reward - tau) / beta;
  return std::exp(tilt < 0.0 ? tilt : 0.0);
}

}  // namespace stars::law
