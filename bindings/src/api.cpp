// The C interface: checks parameters, picks the instruction set, runs operations and programs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "cpus.h"
#include "error.h"
#include "formats.h"
#include "handles.h"
#include "ops.h"
#include "packing.h"
#include "parallel.h"
#include "sizes.h"
#include "stars.h"
#ifdef STARS_X86
#include "x86.h"
#endif

namespace stars {

namespace {

struct isa {
  const char* name;
  const op_table* table;
};

isa choose_isa() {
  isa best = {"base", &base::table};
#ifdef STARS_X86
  static const op_table avx512_vnni_table = [] {
    op_table table = avx512::table;
    table.linear_quantised = avx512_vnni::linear_quantised;
    return table;
  }();
  static const op_table avx512_bf16_table = [] {
    op_table table = avx512_vnni_table;
    table.linear = avx512_bf16::linear;
    return table;
  }();
  const isa wider[] = {{"avx2", &avx2::table},
                       {"avx512", &avx512::table},
                       {"avx512_vnni", &avx512_vnni_table},
                       {"avx512_bf16", &avx512_bf16_table}};
  const x86_features cpu = features_of_cpu();
  const bool supported[] = {cpu.avx2, cpu.avx512, cpu.vnni, cpu.bf16};
  const char* wanted = std::getenv("STARS_ISA");  // for tests: the best at most this wide
  for (int i = 0; i < 4 && supported[i]; ++i) {
    if (wanted && std::strcmp(wanted, best.name) == 0) break;
    best = wider[i];
  }
#endif
  return best;
}

// When the library is loaded: a lock that the first call would take could be held by another thread at a fork.
const isa chosen_isa = choose_isa();

// The product of a weight, by how it is stored.
struct any_linear {
  const op_table& table;
  void operator()(const stars_linear_params& p) const {
    (is_quantised(p.dtype) ? table.linear_quantised : table.linear)(p);
  }
};

// The number of an operation, its name, and what runs it, given a table.
#define STARS_FOR_EACH_OP(X)                     \
  X(LINEAR, linear, any_linear{table})           \
  X(EMBEDDING, embedding, table.embedding)       \
  X(RMS_NORM, rms_norm, table.rms_norm)          \
  X(SWIGLU, swiglu, table.swiglu)                \
  X(RESCALE, rescale, table.rescale)             \
  X(TAKE_ROWS, take_rows, table.take_rows)       \
  X(ROPE_WRITE, rope_write, table.rope_write)    \
  X(ATTENTION, attention, table.attention)       \
  X(SAMPLE_STEP, sample_step, table.sample_step) \
  X(COPY_ROWS, copy_rows, table.copy_rows)       \
  X(DECIDE, decide, decide)                      \
  X(APPEND_DRAFT, append_draft, append_draft)    \
  X(APPLY_PENALTIES, apply_penalties, apply_penalties) \
  X(BLEND_LOGITS, blend_logits, blend_logits)    \
  X(EDIT_LOGITS, edit_logits, edit_logits)          \
  X(TOP_LOGPROBS, top_logprobs, table.top_logprobs)

constexpr int64_t kMaxProducts = int64_t{1} << 60;  // of a matrix product; ten years of all cores of anything

// What each check says is what must hold; null when all of it does.
#define STARS_REQUIRE(condition, text) \
  if (!(condition)) return text

constexpr char kWrongDtype[] = "dtype must be 0 (float32), 1 or 2 (bfloat16), or 3 to 13 (of 4 to 8 bits)";

bool weight_fits(int64_t out_features, int64_t in_features, int32_t dtype) {
  return is_quantised(dtype) ? quantised_fits(out_features, in_features) : packed_fits(out_features, in_features);
}

const char* check(const stars_linear_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.in_features > 0 && p.out_features > 0,
                "rows must be >= 0, in_features and out_features positive");
  STARS_REQUIRE(p.dtype >= STARS_F32 && p.dtype <= kLastFormat, kWrongDtype);
  STARS_REQUIRE(fits(p.rows, p.in_features), "rows * in_features is too large");
  STARS_REQUIRE(fits(p.rows, p.out_features), "rows * out_features is too large");
  STARS_REQUIRE(weight_fits(p.out_features, p.in_features, p.dtype), "out_features * in_features is too large");
  STARS_REQUIRE(p.in_features % inputs_of(p.dtype) == 0, "in_features must be a multiple of the dtype's group");
  int64_t products;
  STARS_REQUIRE(!__builtin_mul_overflow(p.rows * p.in_features, p.out_features, &products) && products <= kMaxProducts,
                "rows * in_features * out_features is too large");
  STARS_REQUIRE(p.out_stride > 0, "out_stride must be positive");
  STARS_REQUIRE(fits(p.rows, p.out_stride), "rows * out_stride is too large");
  STARS_REQUIRE(p.out_column >= 0 && p.out_column <= p.out_stride - p.out_features,
                "out_column must be >= 0, and out_features columns from it on within out_stride");
  STARS_REQUIRE(p.rows == 0 || (p.x && p.weight && p.out), "x, weight and out must not be null");
  return nullptr;
}

const char* check(const stars_embedding_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.hidden > 0 && p.vocab > 0, "rows must be >= 0, hidden and vocab positive");
  STARS_REQUIRE(p.dtype >= STARS_F32 && p.dtype <= kLastFormat, kWrongDtype);
  STARS_REQUIRE(fits(p.rows, p.hidden), "rows * hidden is too large");
  STARS_REQUIRE(weight_fits(p.vocab, p.hidden, p.dtype), "vocab * hidden is too large");
  STARS_REQUIRE(p.hidden % inputs_of(p.dtype) == 0, "hidden must be a multiple of the dtype's group");
  STARS_REQUIRE(p.rows == 0 || (p.token_ids && p.weight && p.out), "token_ids, weight and out must not be null");
  return nullptr;
}

const char* check(const stars_rms_norm_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.hidden > 0, "rows must be >= 0 and hidden positive");
  STARS_REQUIRE(fits(p.rows, p.hidden), "rows * hidden is too large");
  STARS_REQUIRE(p.x_stride >= p.hidden && p.out_stride >= p.hidden, "x_stride and out_stride must not be below hidden");
  STARS_REQUIRE(fits(p.rows, p.x_stride) && fits(p.rows, p.out_stride), "rows * x_stride or out_stride is too large");
  STARS_REQUIRE(p.eps >= 0, "eps must not be negative");
  STARS_REQUIRE(p.rows == 0 || (p.x && p.weight && p.out), "x, weight and out must not be null");
  return nullptr;
}

const char* check(const stars_swiglu_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.intermediate > 0, "rows must be >= 0 and intermediate positive");
  STARS_REQUIRE(fits(2, p.rows, p.intermediate), "2 * rows * intermediate is too large");
  STARS_REQUIRE(p.activation == STARS_SILU || p.activation == STARS_GELU_TANH,
                "activation must be 0 (silu) or 1 (gelu by tanh)");
  STARS_REQUIRE(p.rows == 0 || (p.gate_up && p.out), "gate_up and out must not be null");
  return nullptr;
}

const char* check(const stars_rescale_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.width > 0, "rows must be >= 0 and width positive");
  STARS_REQUIRE(fits(p.rows, p.width), "rows * width is too large");
  STARS_REQUIRE(p.softcap >= 0, "softcap must not be negative");
  STARS_REQUIRE(p.rows == 0 || p.x, "x must not be null");
  return nullptr;
}

const char* check(const stars_take_rows_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.width > 0, "rows must be >= 0 and width positive");
  STARS_REQUIRE(fits(p.rows, p.width), "rows * width is too large");
  STARS_REQUIRE(p.rows == 0 || (p.x && p.index && p.out), "x, index and out must not be null");
  return nullptr;
}

const char* check(const stars_batch& b) {
  STARS_REQUIRE(b.rows >= 0 && b.sequences >= 0, "rows and sequences of the batch must be >= 0");
  STARS_REQUIRE(fits(b.rows), "rows of the batch is too large");
  STARS_REQUIRE(fits(b.sequences), "sequences of the batch is too large");
  STARS_REQUIRE(b.block_table_stride >= 0, "block_table_stride must be >= 0");
  STARS_REQUIRE(fits(b.block_table_stride), "block_table_stride is too large");
  STARS_REQUIRE(b.rows == 0 || b.block_table_stride == 0 || b.block_tables, "block_tables must not be null");
  STARS_REQUIRE(b.rows == 0 || (b.positions && b.slots && b.row_start && b.seq_group && b.prefix_len && b.slab_start &&
                                b.slab_used),
                "no array of the batch may be null");
  return nullptr;
}

const char* check(const stars_layer_kv& kv, bool into_slab) {
  STARS_REQUIRE(kv.page_size > 0 && kv.kv_heads > 0 && kv.head_dim > 0,
                "page_size, kv_heads and head_dim must be positive");
  STARS_REQUIRE(fits(kv.page_size, kv.kv_heads, kv.head_dim), "page_size * kv_heads * head_dim is too large");
  STARS_REQUIRE(into_slab || (kv.k_pages && kv.v_pages), "pages must not be null");
  STARS_REQUIRE(!into_slab || (kv.k_slabs && kv.v_slabs), "slabs must not be null");
  return nullptr;
}

const char* check(const stars_rope_write_params& p) {
  if (const char* wrong = check(p.batch)) return wrong;
  if (const char* wrong = check(p.kv, p.batch.into_slab)) return wrong;
  STARS_REQUIRE(p.heads > 0, "heads must be positive");
  STARS_REQUIRE(fits(p.heads), "heads is too large");
  STARS_REQUIRE(fits(p.batch.rows, p.heads + 2 * p.kv.kv_heads, p.kv.head_dim),
                "rows * (heads + 2 * kv_heads) * head_dim is too large");
  STARS_REQUIRE(p.kv.head_dim % 2 == 0, "head_dim must be even");
  STARS_REQUIRE(!p.q_norm == !p.k_norm, "q_norm and k_norm must both be given or both be null");
  STARS_REQUIRE(p.batch.rows == 0 || (p.qkv && p.cos && p.sin && p.q_out), "qkv, cos, sin and q_out must not be null");
  return nullptr;
}

const char* check(const stars_attention_params& p) {
  if (const char* wrong = check(p.batch)) return wrong;
  if (const char* wrong = check(p.kv, p.batch.into_slab)) return wrong;
  STARS_REQUIRE(p.heads > 0 && p.heads % p.kv.kv_heads == 0, "heads must be a positive multiple of kv_heads");
  STARS_REQUIRE(fits(p.batch.rows, p.heads, p.kv.head_dim), "rows * heads * head_dim is too large");
  STARS_REQUIRE(fits(p.batch.rows + p.batch.sequences, p.kv.kv_heads), "(rows + sequences) * kv_heads is too large");
  STARS_REQUIRE(p.window >= 0 && p.softcap >= 0, "window and softcap must be >= 0 (0: none)");
  STARS_REQUIRE(p.batch.rows == 0 || (p.q && p.out), "q and out must not be null");
  return nullptr;
}

const char* check(const stars_sample_step_params& p) {
  STARS_REQUIRE(p.lanes >= 0 && p.vocab > 0 && p.max_steps >= 0 && p.max_stop_ids >= 0,
                "lanes, max_steps and max_stop_ids must be >= 0 and vocab positive");
  STARS_REQUIRE(p.vocab <= INT32_MAX, "vocab must be below 2^31, as token ids are");
  STARS_REQUIRE(p.max_steps <= INT32_MAX, "max_steps must be below 2^31, as steps are");
  STARS_REQUIRE(fits(p.lanes, p.vocab), "lanes * vocab is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_steps), "lanes * max_steps is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_stop_ids), "lanes * max_stop_ids is too large");
  STARS_REQUIRE(p.lanes == 0 || (p.logits && p.token_ids && p.positions && p.slots && p.slab_used && p.steps &&
                                 p.max_tokens && p.done && p.seeds && p.attempts && p.streams && p.temperature &&
                                 p.top_k && p.top_p && p.min_p),
                "no array of the lanes may be null");
  STARS_REQUIRE(p.lanes == 0 || p.max_steps == 0 || (p.out_tokens && p.out_logprobs),
                "out_tokens and out_logprobs must not be null");
  STARS_REQUIRE(p.lanes == 0 || p.max_stop_ids == 0 || p.stop_ids, "stop_ids must not be null");
  STARS_REQUIRE(!p.entropy_cut == !p.least_tokens, "entropy_cut and least_tokens must both be null, or neither");
  return nullptr;
}

const char* check(const stars_copy_rows_params& p) {
  STARS_REQUIRE(p.rows >= 0 && p.layers >= 0 && p.width > 0, "rows and layers must be >= 0 and width positive");
  STARS_REQUIRE(p.source_rows >= 0 && p.target_rows >= 0, "source_rows and target_rows must be >= 0");
  STARS_REQUIRE(p.rows == 0 || p.layers == 0 || (p.source_rows > 0 && p.target_rows > 0),
                "source_rows and target_rows must be positive where rows are copied");
  STARS_REQUIRE(fits(p.layers, p.rows), "layers * rows is too large");
  STARS_REQUIRE(fits(p.layers, p.source_rows, p.width), "layers * source_rows * width is too large");
  STARS_REQUIRE(fits(p.layers, p.target_rows, p.width), "layers * target_rows * width is too large");
  STARS_REQUIRE(p.rows == 0 || p.layers == 0 ||
                    (p.k_source && p.v_source && p.k_target && p.v_target && p.source && p.target),
                "no array may be null");
  return nullptr;
}

const char* check(const stars_decide_params& p) {
  STARS_REQUIRE(p.lanes >= 0, "lanes must be >= 0");
  STARS_REQUIRE(fits(p.lanes), "lanes is too large");
  STARS_REQUIRE(p.lanes == 0 || (p.seeds && p.streams && p.attempts && p.tokens && p.max_tokens && p.start &&
                                 p.reward_threshold && p.beta && p.rewards && p.accepted),
                "no array may be null");
  return nullptr;
}

const char* check(const stars_append_draft_params& p) {
  STARS_REQUIRE(p.sequences >= 0 && p.max_steps >= 0 && p.max_stop_ids >= 0 && p.max_closing >= 0 && p.vocab > 0,
                "sequences, max_steps, max_stop_ids and max_closing must be >= 0 and vocab positive");
  STARS_REQUIRE(fits(p.vocab), "vocab is too large");
  STARS_REQUIRE(p.max_steps <= INT32_MAX, "max_steps must be below 2^31, as steps are");
  STARS_REQUIRE(fits(p.max_stop_ids), "max_stop_ids is too large");
  STARS_REQUIRE(fits(p.sequences, p.max_closing), "sequences * max_closing is too large");
  STARS_REQUIRE(p.sequences == 0 || (p.steps && p.lanes && p.row_start && p.token_ids && p.last),
                "steps, lanes, row_start, token_ids and last must not be null");
  STARS_REQUIRE(p.sequences == 0 || ((p.max_steps == 0 || p.out_tokens) && (p.max_stop_ids == 0 || p.stop_ids) &&
                                     (p.max_closing == 0 || p.closing)),
                "out_tokens, stop_ids and closing must not be null");
  return nullptr;
}

const char* check(const stars_apply_penalties_params& p) {
  STARS_REQUIRE(p.lanes >= 0 && p.vocab > 0 && p.max_steps >= 0 && p.entries >= 0,
                "lanes, max_steps and entries must be >= 0 and vocab positive");
  STARS_REQUIRE(p.max_steps <= INT32_MAX, "max_steps must be below 2^31, as steps are");
  STARS_REQUIRE(fits(p.lanes, p.vocab), "lanes * vocab is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_steps), "lanes * max_steps is too large");
  STARS_REQUIRE(fits(p.entries, 2), "entries is too large");
  STARS_REQUIRE(p.lanes == 0 || (p.logits && p.done && p.steps && p.start && p.count && p.repetition && p.frequency &&
                                 p.presence),
                "no array of the lanes may be null");
  STARS_REQUIRE(p.lanes == 0 || ((p.max_steps == 0 || p.out_tokens) && (p.entries == 0 || p.history)),
                "out_tokens and history must not be null");
  return nullptr;
}

const char* check(const stars_blend_logits_params& p) {
  STARS_REQUIRE(p.models > 0 && p.room >= 0 && p.lanes >= 0 && p.vocab > 0,
                "room and lanes must be >= 0, models and vocab positive");
  STARS_REQUIRE(fits(p.models, p.room, p.vocab), "models * room * vocab is too large");
  STARS_REQUIRE(fits(p.lanes, p.vocab), "lanes * vocab is too large");
  STARS_REQUIRE(p.lanes <= p.room, "lanes must be at most room");
  STARS_REQUIRE(p.lanes == 0 || (p.logits && p.weights && p.done && p.out),
                "logits, weights, done and out must not be null");
  return nullptr;
}

const char* check(const stars_edit_logits_params& p) {
  STARS_REQUIRE(p.lanes >= 0 && p.vocab > 0 && p.max_steps >= 0 && p.entry_count >= 0 && p.word_rows >= 0 &&
                    p.mask_rows >= 0,
                "lanes, max_steps, entry_count, word_rows and mask_rows must be >= 0 and vocab positive");
  STARS_REQUIRE(p.word_length >= 2 && p.word_length <= INT32_MAX, "word_length must be at least 2 and below 2^31");
  STARS_REQUIRE(p.max_steps <= INT32_MAX, "max_steps must be below 2^31, as steps are");
  STARS_REQUIRE(fits(p.lanes, p.vocab), "lanes * vocab is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_steps), "lanes * max_steps is too large");
  STARS_REQUIRE(fits(p.lanes, p.word_length), "lanes * word_length is too large");
  STARS_REQUIRE(fits(p.entry_count, 3), "entry_count is too large");
  STARS_REQUIRE(fits(p.word_rows, p.word_length), "word_rows * word_length is too large");
  STARS_REQUIRE(fits(p.mask_rows, p.vocab), "mask_rows * vocab is too large");
  STARS_REQUIRE(p.lanes == 0 || (p.logits && p.done && p.steps && p.start && p.count && p.base && p.first_word &&
                                 p.word_count && p.tail && p.mask_row),
                "no array of the lanes may be null");
  STARS_REQUIRE(p.lanes == 0 || ((p.max_steps == 0 || p.out_tokens) && (p.entry_count == 0 || p.entries) &&
                                 (p.word_rows == 0 || p.words) && (p.mask_rows == 0 || p.masks)),
                "out_tokens, entries, words and masks must not be null");
  return nullptr;
}

const char* check(const stars_top_logprobs_params& p) {
  STARS_REQUIRE(p.lanes >= 0 && p.vocab > 0 && p.max_steps >= 0 && p.most >= 0,
                "lanes, max_steps and most must be >= 0 and vocab positive");
  STARS_REQUIRE(p.vocab <= INT32_MAX, "vocab must be below 2^31, as token ids are");
  STARS_REQUIRE(p.max_steps <= INT32_MAX, "max_steps must be below 2^31, as steps are");
  STARS_REQUIRE(p.most <= INT32_MAX, "most must be below 2^31, as what is wanted is");
  STARS_REQUIRE(fits(p.lanes, p.vocab), "lanes * vocab is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_steps), "lanes * max_steps is too large");
  STARS_REQUIRE(fits(p.lanes, p.max_steps, p.most), "lanes * max_steps * most is too large");
  STARS_REQUIRE(p.lanes == 0 || (p.logits && p.steps && p.wanted && p.told), "no array of the lanes may be null");
  STARS_REQUIRE(p.lanes == 0 || p.max_steps == 0 || (p.tokens && p.ranks), "tokens and ranks must not be null");
  STARS_REQUIRE(p.lanes == 0 || p.max_steps == 0 || p.most == 0 || (p.token_ids && p.logprobs),
                "token_ids and logprobs must not be null");
  return nullptr;
}

#undef STARS_REQUIRE

constexpr char kOtherSize[] = "size must be the sizeof of the struct that this version of stars.h has";

// Runs an operation; its status.
using run_function = int32_t (*)(const op_table&, const void* params);

// Checks the parameters and hands them to then(params, run), run being a function that knows their type. The status is
// that of the check, or what `then` returns.
template <class Then>
int32_t with_op(int32_t op, const void* params, Then&& then) {
  if (!params) return fail("stars_call", "params must not be null");
  switch (op) {
#define STARS_CASE(NUMBER, name, function)                                               \
  case STARS_OP_##NUMBER: {                                                              \
    using type = stars_##name##_params;                                                  \
    const type& typed = *static_cast<const type*>(params);                               \
    if (typed.size != sizeof(type)) return fail(#name, kOtherSize);                      \
    if (const char* wrong = check(typed)) return fail(#name, wrong);                     \
    const run_function run = []([[maybe_unused]] const op_table& table, const void* p) { \
      return guarded(#name, [&] { function(*static_cast<const type*>(p)); });            \
    };                                                                                   \
    return then(typed, run);                                                             \
  }
    STARS_FOR_EACH_OP(STARS_CASE)
#undef STARS_CASE
  }
  return fail("stars_call", "the operation is unknown to this version of libstars");
}

}  // namespace

const op_table& ops() { return *chosen_isa.table; }

}  // namespace stars

namespace {

struct program {
  struct step {
    stars::run_function run;
    union {
#define STARS_MEMBER(NUMBER, name, function) stars_##name##_params name;
      STARS_FOR_EACH_OP(STARS_MEMBER)
#undef STARS_MEMBER
    } params;
  };
  std::vector<step> steps;
};

stars::handle_table<program, stars_program, stars::kProgram> programs;

bool all_set(const int32_t* done, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!done[i]) return false;
  return true;
}

}  // namespace

int32_t stars_abi_version(void) { return STARS_ABI_VERSION; }

int32_t stars_check_version(int32_t version) {
  if (version == STARS_ABI_VERSION) return STARS_OK;
  char text[160];
  std::snprintf(text, sizeof text, "the program was compiled with version %d of stars.h and this library has %d: "
                                   "compile the program again", static_cast<int>(version), STARS_ABI_VERSION);
  return stars::fail("stars_check_version", text);
}

const char* stars_isa(void) { return stars::chosen_isa.name; }

int32_t stars_num_threads(void) { return stars::num_threads(); }

int32_t stars_set_alone(int32_t alone) { return stars::set_alone(alone != 0); }

int32_t stars_set_num_threads(int32_t count) {
  if (count < 0) return stars::fail("stars_set_num_threads", "count must be >= 0 (0: the default)");
  stars::set_num_threads(count);
  return STARS_OK;
}

int32_t stars_usable_cpus(const char* root) { return stars::usable_cpus(root ? root : ""); }
double stars_cpu_quota(const char* root) { return stars::cpu_quota(root ? root : ""); }

int32_t stars_call(int32_t op, const void* params) {
  return stars::with_op(op, params, [](const auto& typed, auto run) { return run(stars::ops(), &typed); });
}

stars_program* stars_program_create(void) {
  std::unique_ptr<program> fresh(new (std::nothrow) program);
  if (fresh) return programs.open(std::move(fresh), "stars_program_create");
  stars::fail_for_memory("stars_program_create");
  return nullptr;
}

int32_t stars_program_add(stars_program* handle, int32_t op, const void* params) {
  decltype(programs)::taken held(programs, handle, "stars_program_add");
  if (!held) return held.status;
  return stars::with_op(op, params, [&](const auto& typed, auto run) {
    return stars::guarded("stars_program_add", [&] {
      program::step& step = held->steps.emplace_back();
      step.run = run;
      std::memcpy(&step.params, &typed, sizeof typed);
    });
  });
}

int32_t stars_program_run(stars_program* handle, int32_t times, const int32_t* done, int64_t done_count) {
  decltype(programs)::taken held(programs, handle, "stars_program_run");
  if (!held) return -held.status;
  if (times < 0) return -stars::fail("stars_program_run", "times must be >= 0");
  if (done && !(done_count >= 0 && stars::fits(done_count)))
    return -stars::fail("stars_program_run", "done_count must be >= 0 and is too large above 2^46");
  const stars::op_table& table = stars::ops();
  for (int32_t ran = 0; ran < times;) {
    for (const program::step& step : held->steps)
      if (const int32_t status = step.run(table, &step.params); status != STARS_OK) return -status;
    ++ran;
    if (done && all_set(done, done_count)) return ran;
  }
  return times;
}

int32_t stars_program_destroy(stars_program* handle) {
  return handle ? programs.close(handle, "stars_program_destroy") : STARS_OK;
}
