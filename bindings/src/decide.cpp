// The law of acceptance for many lanes at once.
#include "law.h"
#include "ops.h"

namespace stars {

void decide(const stars_decide_params& p) {
  for (int64_t lane = 0; lane < p.lanes; ++lane) {
    const uint32_t stream = static_cast<uint32_t>(p.streams[lane]);
    const uint32_t attempt = static_cast<uint32_t>(p.attempts[lane]);
    const double uniform =
        stars_accept_uniform(static_cast<uint64_t>(p.seeds[lane]), attempt, stream & 0xFFFFF, stream >> 20);
    const double tau = law::threshold(p.tokens[lane], p.max_tokens[lane], p.start[lane], p.reward_threshold[lane]);
    const double reward = p.rewards[lane];
    p.accepted[lane] = reward < law::infinity && law::accepts(uniform, reward, tau, p.beta[lane]);  // not where it is NaN
  }
}

}  // namespace stars
