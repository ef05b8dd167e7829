// Drafted segments as the input of a scoring pass, as kernels/append_draft.py has it.
#include <algorithm>

#include "ops.h"

namespace stars {

void append_draft(const stars_append_draft_params& p) {
  for (int64_t sequence = 0; sequence < p.sequences; ++sequence) {
    const int64_t lane = p.lanes[sequence];
    if (lane < 0) continue;
    const int32_t* drawn = p.out_tokens + lane * p.max_steps;
    const int32_t* stop_ids = p.stop_ids + lane * p.max_stop_ids;
    const int32_t* closing = p.closing + sequence * p.max_closing;
    int64_t count = std::clamp<int64_t>(p.steps[lane], 0, p.max_steps);
    // Logits that were NaN left -1, which is among the stop ids.
    if (count > 0 && std::find(stop_ids, stop_ids + p.max_stop_ids, drawn[count - 1]) != stop_ids + p.max_stop_ids)
      --count;
    int64_t row = p.row_start[sequence] + 1;
    for (int64_t i = 0; i < count; ++i) p.token_ids[row++] = drawn[i] >= 0 && drawn[i] < p.vocab ? drawn[i] : 0;
    for (int64_t i = 0; i < p.max_closing; ++i)
      if (closing[i] >= 0) p.token_ids[row++] = closing[i];
    p.last[sequence] = static_cast<int32_t>(std::max<int64_t>(row - 1, 0));
  }
}

}  // namespace stars
