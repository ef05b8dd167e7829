#include "ops.h"

namespace stars::STARS_ISA {

void sample_step(const stars_sample_step_params&) {}

}  // namespace stars::STARS_ISA
