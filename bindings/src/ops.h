// The operations, defined once per instruction set in a namespace of its own, and the table through which they are
// called; below it those that have no vectors in them and are compiled once. Sources compiled per instruction set must
// keep every function that is not inlined inside that namespace (or an anonymous one) and use no standard containers:
// the linker merges equal names, and a copy compiled for AVX-512 could end up serving a machine without it.
#pragma once

#include "stars.h"

namespace stars {

struct op_table {
  void (*linear)(const stars_linear_params&);
  void (*linear_quantised)(const stars_linear_params&);  // of 4 to 8 bits
  void (*embedding)(const stars_embedding_params&);
  void (*rms_norm)(const stars_rms_norm_params&);
  void (*swiglu)(const stars_swiglu_params&);
  void (*rescale)(const stars_rescale_params&);
  void (*take_rows)(const stars_take_rows_params&);
  void (*rope_write)(const stars_rope_write_params&);
  void (*attention)(const stars_attention_params&);
  void (*sample_step)(const stars_sample_step_params&);
  void (*copy_rows)(const stars_copy_rows_params&);
};

namespace base {
extern const op_table table;
}
namespace avx2 {
extern const op_table table;
}
namespace avx512 {
extern const op_table table;
}
namespace avx512_vnni {  // all else is avx512's
void linear_quantised(const stars_linear_params&);
}
namespace avx512_bf16 {  // all else is avx512_vnni's
void linear(const stars_linear_params&);
}

// The table of the instruction set in use.
const op_table& ops();

void decide(const stars_decide_params&);
void append_draft(const stars_append_draft_params&);
void apply_penalties(const stars_apply_penalties_params&);
void blend_logits(const stars_blend_logits_params&);
void edit_logits(const stars_edit_logits_params&);

#ifdef STARS_ISA
namespace STARS_ISA {
void linear(const stars_linear_params&);
void linear_quantised(const stars_linear_params&);
void embedding(const stars_embedding_params&);
void rms_norm(const stars_rms_norm_params&);
void swiglu(const stars_swiglu_params&);
void rescale(const stars_rescale_params&);
void take_rows(const stars_take_rows_params&);
void rope_write(const stars_rope_write_params&);
void attention(const stars_attention_params&);
void sample_step(const stars_sample_step_params&);
void copy_rows(const stars_copy_rows_params&);
}  // namespace STARS_ISA
#endif

}  // namespace stars
