#include "ops.h"

namespace stars::STARS_ISA {

void attention(const stars_attention_params&) {}

}  // namespace stars::STARS_ISA
