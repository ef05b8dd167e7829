// Weighted sums of several models' logits, as kernels/blend_logits.py has them.
#include <algorithm>
#include <limits>

#include "ops.h"
#include "parallel.h"

namespace stars {
namespace {

constexpr int64_t kBlock = 512;  // columns of one task at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Columns first .. first + count - 1 of a lane. Formed in double and rounded once; all models are read before anything
// is written, as `out` may be one of them.
void blend_block(const stars_blend_logits_params& p, int64_t lane, int64_t first, int64_t count) {
  double total[kBlock] = {};
  bool forbidden[kBlock] = {};
  for (int64_t model = 0; model < p.models; ++model) {
    const double weight = p.weights[model * p.room + lane];
    if (weight == 0.0) continue;
    const float* const row = p.logits + (model * p.room + lane) * p.vocab + first;
    for (int64_t i = 0; i < count; ++i) {
      const float logit = row[i];
      forbidden[i] |= logit == -kInfinity;
      const double usable = logit == kInfinity ? std::numeric_limits<double>::quiet_NaN() : logit;
      total[i] += logit == -kInfinity ? 0.0 : weight * usable;
    }
  }
  float* const out = p.out + lane * p.vocab + first;
  for (int64_t i = 0; i < count; ++i)
    out[i] = forbidden[i] && total[i] == total[i] ? -kInfinity : static_cast<float>(total[i]);
}

}  // namespace

void blend_logits(const stars_blend_logits_params& p) {
  const int64_t blocks = (p.vocab + kBlock - 1) / kBlock;
  // A task is a share of a lane's columns: few lanes of a large vocabulary are spread, too.
  constexpr int64_t kBlocksPerTask = 32;
  const int64_t tasks = (blocks + kBlocksPerTask - 1) / kBlocksPerTask;
  parallel(p.lanes * tasks, [&p, tasks](int64_t task) {
    const int64_t lane = task / tasks;
    if (p.done[lane]) return;
    const int64_t begin = task % tasks * kBlocksPerTask * kBlock;
    const int64_t end = std::min(p.vocab, begin + kBlocksPerTask * kBlock);
    for (int64_t first = begin; first < end; first += kBlock)
      blend_block(p, lane, first, std::min(kBlock, end - first));
  });
}

}  // namespace stars
