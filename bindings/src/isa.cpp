// The table of one instruction set's operations.
#include "ops.h"

namespace stars::STARS_ISA {

const op_table table = {linear,  linear_quantised, embedding,  rms_norm,  swiglu,
                        rescale, take_rows,        rope_write, attention, sample_step, copy_rows,
                        top_logprobs};

}  // namespace stars::STARS_ISA
