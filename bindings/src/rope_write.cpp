#include "ops.h"

namespace stars::STARS_ISA {

void rope_write(const stars_rope_write_params&) {}

}  // namespace stars::STARS_ISA
