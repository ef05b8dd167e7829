/* libstars: the C interface. Plain data in, plain data out; no exception crosses, nothing here needs Python or torch.
 *
 * An operation is a struct of parameters and a number. `size` of the struct is its sizeof, so that a caller that was
 * compiled with another version of this header is refused. stars_call runs one; a program is a list of them, recorded
 * once over buffers at fixed addresses and replayed as one call (the CPU's counterpart of a captured CUDA graph).
 * Lengths, positions and tokens are read from memory when an operation runs, never when it is recorded.
 *
 * All matrices are row-major and contiguous. Any thread may call at any time (what an operation writes belongs to one
 * caller at a time); the library spreads the work over a pool of its own, which one operation has at a time: others run
 * in their callers' threads meanwhile.
 *
 * Sizes are checked, contents are not. An array has at most 2^46 elements, whatever its sizes; a size that may be 0
 * makes an array that may be NULL.
 */
#ifndef STARS_H
#define STARS_H

#include <stdint.h>

#if defined(_WIN32)
#define STARS_API __declspec(dllexport)
#else
#define STARS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define STARS_ABI_VERSION 11

typedef enum {
  STARS_OK = 0,
  STARS_INVALID = 1,       /* a parameter is out of range; stars_last_error says which. Nothing was written */
  STARS_OUT_OF_MEMORY = 2, /* the outputs hold nothing of use; the library, and any program, can be used again */
  STARS_EXHAUSTED = 3,     /* there are fewer pages than were asked for. Nothing was changed */
  STARS_CLOSED = 4,        /* the handle was closed before, or is none of such an object */
  STARS_BUSY = 5,          /* another thread is at work with the object of the handle */
  STARS_CORRUPT = 6,       /* the books of a ledger do not balance; stars_last_error has the numbers */
} stars_status;

/* How a matrix is stored, and how products with it are formed. */
typedef enum {
  STARS_F32 = 0,
  STARS_BF16 = 1, /* widened to float32, so the bits are those of the same matrix in float32 */
  /* bfloat16 in pairs of inputs. With the instruction set "avx512_bf16" x is rounded to bfloat16 too (to nearest even,
   * subnormals to zero), pairs of products are added up in float32. Others form the same products as of STARS_BF16. */
  STARS_BF16_DOT = 2,
  /* In 4 to 8 bits, since version 8: made by stars_pack_quant. Products of them round x, in groups of 32 inputs, to 16
   * bits: to the nearest of 65535 steps from minus the group's largest magnitude to it. Within a group products are
   * summed up exactly, over groups in float32 in order. A row of x with a NaN or an infinity makes a row of NaN. */
  STARS_INT8 = 3, /* a float32 scale for each output */
  STARS_Q8_0 = 4, /* as GGUF files have them: groups of 32 inputs with a float16 scale, ..._1 with a float16 minimum */
  STARS_Q4_0 = 5,
  STARS_Q4_1 = 6,
  STARS_Q5_0 = 7,
  STARS_Q5_1 = 8,
  STARS_Q4_K = 9, /* and groups of 32 or 16 with integer scales, 256 inputs with float16 scales of those */
  STARS_Q5_K = 10,
  STARS_Q6_K = 11,
  STARS_INT4 = 12, /* float16 scales and zeros; of symmetric ones STARS_Q4_0 */
  STARS_INT4_F32 = 13, /* float32 scales and float16 zeros, 8 for symmetric ones */
} stars_dtype;

typedef enum {
  STARS_OP_LINEAR = 0,
  STARS_OP_EMBEDDING = 1,
  STARS_OP_RMS_NORM = 2,
  STARS_OP_SWIGLU = 3,
  STARS_OP_TAKE_ROWS = 4,
  STARS_OP_ROPE_WRITE = 5,
  STARS_OP_ATTENTION = 6,
  STARS_OP_SAMPLE_STEP = 7,
  STARS_OP_COPY_ROWS = 8,
  STARS_OP_DECIDE = 9,
  STARS_OP_APPEND_DRAFT = 10,
  STARS_OP_APPLY_PENALTIES = 11,
  STARS_OP_BLEND_LOGITS = 12,
  STARS_OP_RESCALE = 13,
  STARS_OP_EDIT_LOGITS = 14,
  STARS_OP_TOP_LOGPROBS = 15,
} stars_op;

/* out[:, out_column : out_column + out_features] = x[rows, in_features] @ weight^T + bias, of out[rows, out_stride].
 * `weight` is what stars_pack or stars_pack_quant made. The bits of a row of `out` do not depend on the number of rows.
 */
typedef struct {
  int64_t size;
  const float* x;
  const void* weight;
  const float* bias; /* or NULL */
  float* out;
  int64_t rows, in_features, out_features;
  int64_t out_stride, out_column; /* since version 8 */
  int32_t dtype;                  /* stars_dtype of the packed weight */
} stars_linear_params;

/* out[i] = row token_ids[i] of a packed weight [vocab, hidden]. */
typedef struct {
  int64_t size;
  const int32_t* token_ids;
  const void* weight;
  float* out;
  int64_t rows, hidden, vocab;
  int32_t dtype;
} stars_embedding_params;

/* residual += x where residual is not NULL; out = weight * y / sqrt(mean(y^2) + eps), y = residual or x. Rows of x and
 * out begin x_stride and out_stride floats after one another, those of residual `hidden`. */
typedef struct {
  int64_t size;
  const float* x;
  const float* weight;
  float* residual; /* or NULL */
  float* out;      /* may be x */
  int64_t rows, hidden, x_stride, out_stride;
  float eps;
} stars_rms_norm_params;

typedef enum {
  STARS_SILU = 0,
  STARS_GELU_TANH = 1, /* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) */
} stars_activation;

/* out[rows, intermediate] = activation(gate_up[:, :intermediate]) * gate_up[:, intermediate:]. */
typedef struct {
  int64_t size;
  const float* gate_up;
  float* out;
  int64_t rows, intermediate;
  int32_t activation; /* stars_activation */
} stars_swiglu_params;

/* x[rows, width] *= scale; where softcap is positive, then x = softcap * tanh(x / softcap). */
typedef struct {
  int64_t size;
  float* x;
  int64_t rows, width;
  float scale, softcap;
} stars_rescale_params;

/* out[i] = x[index[i]], rows of `width` floats. */
typedef struct {
  int64_t size;
  const float* x;
  const int32_t* index;
  float* out;
  int64_t rows, width;
} stars_take_rows_params;

/* One layer's keys and values, [rows, kv_heads, head_dim] float32 each. */
typedef struct {
  float* k_pages;
  float* v_pages;
  float* k_slabs;
  float* v_slabs;
  int64_t page_size, kv_heads, head_dim;
} stars_layer_kv;

/* A ragged batch; see kernels/types.py, Batch, which this mirrors. */
typedef struct {
  const int32_t* positions;    /* [rows] */
  const int32_t* slots;        /* [rows], -1 writes nothing */
  const int32_t* row_start;    /* [sequences + 1] */
  const int32_t* seq_group;    /* [sequences] */
  const int32_t* block_tables; /* [groups, block_table_stride] page ids */
  const int32_t* prefix_len;   /* [sequences] */
  const int32_t* slab_start;   /* [sequences] */
  const int32_t* slab_used;    /* [sequences] */
  int64_t rows, sequences, block_table_stride;
  int32_t into_slab;
} stars_batch;

/* qkv[rows, (heads + 2 kv_heads) * head_dim] to rotated q_out[rows, heads, head_dim], keys and values at batch.slots. */
typedef struct {
  int64_t size;
  const float* qkv;
  const float* cos; /* [positions, head_dim / 2] */
  const float* sin;
  const float* q_norm; /* [head_dim] or NULL */
  const float* k_norm;
  float* q_out;
  stars_batch batch;
  stars_layer_kv kv;
  int64_t heads;
  float eps;
} stars_rope_write_params;

/* Causal grouped-query attention over pages and slab. */
typedef struct {
  int64_t size;
  const float* q; /* [rows, heads, head_dim] */
  float* out;     /* [rows, heads, head_dim] */
  stars_batch batch;
  stars_layer_kv kv;
  int64_t heads;
  int64_t window; /* 0: none */
  float scale;
  float softcap; /* 0: none */
} stars_attention_params;

/* One draw for every lane that is not done. With z = logits / temperature, filters in this order: min_p keeps z >= max
 * z + log(min_p), top_k the k largest, top_p the smallest set of the most probable whose share reaches it. The token
 * is the argmax of z + noise (stars_gumbel's, at position `steps` of the segment); of a temperature of 0 that of the
 * logits. Its log-probability is log_softmax(logits)'s, nats. It goes to column `steps` of out_tokens and
 * out_logprobs, and steps grows by one. A lane whose token is one of its stop_ids, or that has max_tokens, is done; of
 * others token_ids is the token, and positions, slots and slab_used grow by one: what the next forward pass reads.
 * Logits of NaN or +inf, or nothing but -inf, give the token -1, of log-probability NaN or -inf, and the lane is done.
 * All arrays are [lanes]. */
typedef struct {
  int64_t size;
  const float* logits; /* [lanes, vocab] */
  int32_t* token_ids; /* in and out: the token that was drawn last */
  int32_t* positions; /* in and out: its position in the text */
  int32_t* slots;     /* in and out: the row of the slabs that its key goes to; hosts without slabs pass zeros */
  int32_t* slab_used; /* in and out: rows of its slab that are written; zeros, likewise */
  int32_t* steps;     /* in and out: tokens drawn so far */
  const int32_t* max_tokens; /* after so many a lane is done */
  int32_t* done;             /* in and out: 0 or 1 */
  int32_t* out_tokens; /* [lanes, max_steps] */
  float* out_logprobs; /* [lanes, max_steps] */
  const int64_t* seeds;    /* the bits of the unsigned key */
  const int32_t* attempts; /* from 1 */
  const int32_t* streams;  /* segment index + 2^20 times the sample index */
  const float* temperature;
  const int32_t* top_k; /* 0: off */
  const float* top_p;   /* 1: off */
  const float* min_p;   /* 0: off */
  const int32_t* stop_ids; /* [lanes, max_stop_ids], padded with -1 */
  int64_t lanes, vocab, max_steps, max_stop_ids;
  /* Since version 6; both may be NULL: no lane is cut. Where the entropy in nats of softmax(logits), at temperature 1 and
   * before any filter, is at least entropy_cut and a lane has drawn least_tokens, it is done without drawing. */
  const float* entropy_cut; /* infinity is off */
  const int32_t* least_tokens;
} stars_sample_step_params;

/* Rows source[i] of k_source and v_source to rows target[i] of k_target and v_target, in every layer. Arrays are
 * [layers, source_rows or target_rows, width]; no target row is named twice, and none is a source row. */
typedef struct {
  int64_t size;
  const float* k_source;
  const float* v_source;
  float* k_target;
  float* v_target;
  const int32_t* source; /* [rows] */
  const int32_t* target; /* [rows] */
  int64_t rows, width, layers, source_rows, target_rows;
} stars_copy_rows_params;

/* accepted[i] = 1 where the law accepts rewards[i], else 0, in float64 as engine/rules.py has it, bit for bit. All arrays
 * are [lanes]. For hosts without Python: the engine decides by its own rules. */
typedef struct {
  int64_t size;
  const int64_t* seeds;      /* the bits of an unsigned key */
  const int32_t* streams;    /* segment index + 2^20 times the sample index */
  const int32_t* attempts;   /* from 1 */
  const int32_t* tokens;     /* of the response, the candidate's included */
  const int32_t* max_tokens; /* not 0 */
  const double* start;
  const double* reward_threshold;
  const double* beta;
  const float* rewards;
  int32_t* accepted;
  int64_t lanes;
} stars_decide_params;

/* Drafted segments, less the stop token that ended them, and closing tokens after the row row_start of every sequence
 * that has a lane; see kernels/append_draft.py. They must fit the rows that the sequence has. */
typedef struct {
  int64_t size;
  const int32_t* out_tokens; /* [lanes, max_steps] */
  const int32_t* steps;      /* [lanes] */
  const int32_t* stop_ids;   /* [lanes, max_stop_ids], padded with -1 */
  const int32_t* lanes;      /* [sequences], -1 leaves the sequence alone */
  const int32_t* row_start;  /* [sequences + 1], from -1 on */
  const int32_t* closing;    /* [sequences, max_closing], padded with -1 */
  int32_t* token_ids;        /* [rows] */
  int32_t* last;             /* [sequences] */
  int64_t sequences, max_steps, max_stop_ids, max_closing, vocab;
} stars_append_draft_params;

/* Penalties on what was said already, on logits in place; see kernels/apply_penalties.py, and kernels/types.py,
 * Penalties, which these mirror. Token ids below 0 or beyond the vocabulary are passed over. */
typedef struct {
  int64_t size;
  float* logits;             /* [lanes, vocab] */
  const int32_t* done;       /* [lanes] */
  const int32_t* steps;      /* [lanes] */
  const int32_t* out_tokens; /* [lanes, max_steps] */
  const int32_t* history;    /* [entries, 2] */
  const int32_t* start;      /* [lanes] */
  const int32_t* count;      /* [lanes] */
  const float* repetition;   /* [lanes] */
  const float* frequency;    /* [lanes] */
  const float* presence;     /* [lanes] */
  int64_t lanes, vocab, max_steps, entries;
} stars_apply_penalties_params;

/* out[i] = the sum over models of weights[model, i] * logits[model, i], of lanes that are not done; where a weight is
 * 0, the model is not read. See kernels/blend_logits.py. */
typedef struct {
  int64_t size;
  const float* logits;  /* [models, room, vocab] */
  const float* weights; /* [models, room] */
  const int32_t* done;  /* [lanes] */
  float* out;           /* [lanes, vocab]; may be the first lanes of one of the models' logits */
  int64_t models, room, lanes, vocab;
} stars_blend_logits_params;

/* Biases, bans and masks of single tokens, on logits in place; see kernels/edit_logits.py, and kernels/types.py, Edits,
 * which these mirror. Token ids below 0 or beyond the vocabulary are passed over, and ranges end with their arrays. */
typedef struct {
  int64_t size;
  float* logits;             /* [lanes, vocab] */
  const int32_t* done;       /* [lanes] */
  const int32_t* steps;      /* [lanes] */
  const int32_t* out_tokens; /* [lanes, max_steps] */
  const int32_t* entries;    /* [entry_count, 3] token, tokens of the response before which it is banned, float's bits */
  const int32_t* start;      /* [lanes] */
  const int32_t* count;      /* [lanes] */
  const int32_t* base;       /* [lanes] */
  const int32_t* words;      /* [word_rows, word_length], to the right; -1 is any token */
  const int32_t* first_word; /* [lanes] */
  const int32_t* word_count; /* [lanes] */
  const int32_t* tail;       /* [lanes, word_length - 1], to the right, padded with -1 */
  const int32_t* masks;      /* [mask_rows, (vocab + 31) / 32] */
  const int32_t* mask_row;   /* [lanes], -1: no mask */
  int64_t lanes, vocab, max_steps, entry_count, word_rows, word_length, mask_rows;
} stars_edit_logits_params;

/* What stood beside the tokens that were drawn; see kernels/top_logprobs.py, and kernels/types.py, TopLogprobs, which
 * these mirror. A lane is read whose `steps` exceed what it `told`, at column steps - 1, and has then told all of them.
 */
typedef struct {
  int64_t size;
  const float* logits;   /* [lanes, vocab] */
  const int32_t* steps;  /* [lanes] */
  const int32_t* tokens; /* [lanes, max_steps] */
  const int32_t* wanted; /* [lanes], -1 leaves the lane alone */
  int32_t* told;         /* [lanes] */
  int32_t* ranks;        /* [lanes, max_steps] */
  int32_t* token_ids;    /* [lanes, max_steps, most] */
  float* logprobs;       /* [lanes, max_steps, most] */
  float* own;            /* [lanes, max_steps] or NULL */
  int64_t lanes, vocab, max_steps, most;
} stars_top_logprobs_params;

STARS_API int32_t stars_abi_version(void);
/* STARS_OK where `version` is the library's. Call it first, with STARS_ABI_VERSION: that is the header's a program was
 * compiled with. Versions differ where a struct or a function does. */
STARS_API int32_t stars_check_version(int32_t version);
/* This header, to the letter, as the library was compiled from it: other languages can read the layouts out of it. */
STARS_API const char* stars_header(void);
STARS_API const char* stars_last_error(void); /* of the calling thread; valid until its next failing call */
STARS_API int32_t stars_last_status(void);    /* the stars_status of that call; for functions that return NULL */
STARS_API const char* stars_isa(void);        /* the one in use: "base", "avx2", "avx512", "avx512_vnni" or
                                               * "avx512_bf16" */

/* Threads that an operation is spread over, the caller's included: of the environment's STARS_NUM_THREADS, else all
 * usable CPUs, never more than those. */
STARS_API int32_t stars_num_threads(void);
/* `count` threads from the next operation on, at most one for every usable CPU (more of them wait for each other's
 * CPUs); 0 restores the default. Operations that run meanwhile, in other threads, end as they began. */
STARS_API int32_t stars_set_num_threads(int32_t count);
/* Whether operations of the calling thread run in it alone, on no other, from the next one on: 1, or 0 as ever. Returns
 * what was. For a small operation beside another library whose threads still wait on the CPUs for their next work: to
 * wake one for it takes longer than the operation. */
STARS_API int32_t stars_set_alone(int32_t alone);

/* CPUs that this process may use: those of its affinity mask, or what the quotas of its cgroups allow, rounded up,
 * where that is less. STARS_USABLE_CPUS in the environment is believed instead. Asked of the system at every call.
 * `root`: a folder that stands for "/" when /proc and /sys are read, for tests; else NULL. */
STARS_API int32_t stars_usable_cpus(const char* root);
/* The smallest quota of this process's cgroups (v1 and v2) and of those above them, in CPUs; 0 where there is none. */
STARS_API double stars_cpu_quota(const char* root);

/* Bytes of the packed form of a [out_features, in_features] matrix, and the packing itself (source in `dtype`). Of a
 * matrix that cannot be, 0, and stars_last_error says why. */
STARS_API int64_t stars_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype);
STARS_API int32_t stars_pack(const void* matrix, int64_t out_features, int64_t in_features, int32_t dtype, void* packed);
STARS_API int32_t stars_unpack(const void* packed, int64_t out_features, int64_t in_features, int32_t dtype, void* matrix);

/* The same of matrices in 4 to 8 bits, STARS_INT8 and above. `values` are, of GGUF's types, rows of its blocks (scales
 * and zeros NULL); int8 [out_features, in_features]; of four bits uint8 [out_features, in_features / 2], the low nibble
 * the even input. `scales`: float32 [out_features] of STARS_INT8; else [out_features, in_features / group], of float16
 * (STARS_INT4, STARS_Q4_0 with scales) or float32. `zeros`: uint8 of the scales' shape, or NULL: 8. `group`: 32 or a
 * multiple of it, where there are scales of groups. stars_unpack_quant makes float32 of what was packed. */
STARS_API int64_t stars_quant_bytes(int64_t out_features, int64_t in_features, int32_t dtype);
STARS_API int32_t stars_pack_quant(const void* values, const void* scales, const void* zeros, int64_t group,
                                   int64_t out_features, int64_t in_features, int32_t dtype, void* packed);
STARS_API int32_t stars_unpack_quant(const void* packed, int64_t out_features, int64_t in_features, int32_t dtype,
                                     float* matrix);

/* The uniforms and words of the counter-based generator, Philox4x32-10. The key is the seed, its low word first. Of
 * token noise c0 is the block of four tokens, c1 the position in the segment, c2 the attempt, c3 segment + 2^20 *
 * sample; of the accept uniform c0 = c1 = 0 and c2 = attempt + 2^24, word 0. A word w is the uniform ((w >> 8) + 0.5)
 * / 2^24, and noise is -log(-log u). */
STARS_API int32_t stars_philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t out[4]);
STARS_API double stars_accept_uniform(uint64_t seed, uint32_t attempt, uint32_t segment, uint32_t sample);
/* float32 Gumbel noise of tokens 0 .. vocab - 1 of one draw, as sample_step uses it. */
STARS_API int32_t stars_gumbel(uint64_t seed, uint32_t position, uint32_t attempt, uint32_t stream, int64_t vocab,
                               float* out);

STARS_API int32_t stars_call(int32_t op, const void* params);

/* Programs, controllers, ledgers and sequences are behind handles. A handle is no address: it is looked up at each call,
 * so that one that was closed, or is of something else, is STARS_CLOSED, and one that another thread is at work with is
 * STARS_BUSY. NULL is STARS_INVALID. At most 2^20 of each kind are open at once; one more is STARS_OUT_OF_MEMORY. */
typedef struct stars_program stars_program;
STARS_API stars_program* stars_program_create(void); /* NULL where there is no memory for it */
STARS_API int32_t stars_program_add(stars_program* program, int32_t op, const void* params); /* copies the parameters */
/* Runs the program up to `times` times; stops early once done[0 .. done_count - 1] are all non-zero (done may be NULL).
 * Returns how often it ran, or a status times -1 where it could not be run or did not come through. */
STARS_API int32_t stars_program_run(stars_program* program, int32_t times, const int32_t* done, int64_t done_count);
STARS_API int32_t stars_program_destroy(stars_program* program); /* NULL is none; a status since version 10 */

/* -- The segment controller: one request of the law, for hosts that draft and score by themselves -------------------
 *
 * A response of at most N = max_tokens tokens is made segment by segment. Of each segment up to max_attempts attempts
 * are drawn, and the first one is accepted, in their order, of which
 *
 *   log u < (r - tau) / beta,  tau = min(t, r0 + n / N (t - r0)),  r0 = (1 - alpha) r(x) + alpha t,
 *
 * t = reward_threshold, r the reward of prompt, response and attempt, n the response's tokens with the attempt's, u a
 * uniform of the attempt's own. Where none is, the best reward wins, the earliest of equals. beta = 0 is the hard rule
 * r >= tau. t = -inf accepts all rewards but -inf; t = +inf none, so that the best of max_attempts wins. float64.
 *
 *   stars_controller* c = stars_controller_open(&params);
 *   while ((count = stars_controller_next(c, attempts, width)) > 0) {   // up to `width` attempts at once
 *     ... draft each from the same text, at most max_tokens tokens, with its random numbers; score; then, in order:
 *     stars_controller_feed(c, scored, count, NULL, &decision);
 *     if (decision.verdict is STARS_ACCEPT or STARS_FALLBACK) {
 *       ... decision.winner becomes history, all else is rewound ...
 *       stars_controller_commit(c);
 *     }                                                                 // STARS_RETRY: all are rewound but the best
 *   }
 *   stars_controller_close(c);
 *
 * `width` changes the speed and never the law: random numbers belong to the attempt. A host whose model is greedy, so
 * that all attempts would be equal, says max_attempts = 1. What is refused changes nothing. */
typedef struct stars_controller stars_controller;

typedef struct {
  int64_t size;
  uint64_t seed;
  double reward_threshold; /* t, in the reward's units; may be infinite */
  double beta;             /* in the reward's units, >= 0 */
  double alpha;            /* 0 .. 1 */
  double prompt_reward;    /* r(x): of the prompt with an empty response; finite; read unless alpha is 1 or t infinite */
  int64_t max_tokens;      /* N: most tokens of the response, an EOS counted */
  int64_t segment_size;    /* tokens; of the last segment, what is left of N. N makes at most 2^20 of them */
  int64_t max_attempts;    /* of a segment, below 2^24 */
  int64_t sample;          /* which of the responses to a prompt that share a seed: 0 .. 4095 */
  /* Of the request; 0: no bound. Attempts drawn; their tokens; rewards computed, the prompt's included. Nothing beyond is
   * drawn: the request ends with what was committed. An attempt that is never fed counts with its max_tokens. */
  int64_t attempts_budget, tokens_budget, rewards_budget;
} stars_controller_params;

/* One attempt that is to be drawn, and its random numbers: those of stars_gumbel(seed, position, attempt, stream, ...)
 * and of STARS_OP_SAMPLE_STEP, position being a token's place in the segment, from 0. */
typedef struct {
  uint64_t seed;
  int32_t attempt;    /* from 1, over all rounds of the segment */
  int32_t stream;     /* segment index + 2^20 * sample, as a counter word has them */
  int32_t max_tokens; /* most tokens; fewer where the response ends, or the host ends a segment early */
  int32_t reserved;   /* 0 */
} stars_attempt;

/* What became of an attempt. */
typedef struct {
  double reward;   /* of prompt, response and attempt; finite or -inf, which rejects */
  int32_t attempt; /* as given */
  int32_t tokens;  /* drawn for it, at least 1; an EOS counts */
  int32_t ended;   /* not 0: the response ends with it */
  int32_t reserved;
} stars_scored;

/* What the law says of an attempt; of one after the winner all 0. */
typedef struct {
  double threshold;   /* tau */
  double probability; /* min(1, exp((r - tau) / beta)) */
  int32_t accepted;
  int32_t reserved;
} stars_note;

typedef enum {
  STARS_UNDECIDED = 0, /* feed the attempts that follow, or, before a segment's first, ask for some */
  STARS_RETRY = 1,     /* all that were given were rejected: ask for more */
  STARS_ACCEPT = 2,    /* `winner` was accepted: commit */
  STARS_FALLBACK = 3,  /* all max_attempts were rejected; `winner` had the best reward: commit */
} stars_verdict;

typedef struct {
  int64_t size;
  int32_t verdict; /* stars_verdict */
  int32_t winner;  /* its attempt; 0: none yet */
  int32_t best;    /* the attempt of the best reward so far, which may win in the end: keep it until then. 0: none */
  int32_t read;    /* how many of those fed by this call the law has read: those up to the winner */
} stars_decision;

typedef enum {
  STARS_RUNNING = 0,
  STARS_STOP = 1,   /* what was committed last had ended */
  STARS_LENGTH = 2, /* max_tokens were committed */
  STARS_BUDGET = 3,
  STARS_ABORTED = 4,
} stars_finish_reason;

/* Where a request stands. Counts are of all segments so far. */
typedef struct {
  int64_t size;
  double reward;            /* of what was committed last; 0 before */
  int64_t segments, tokens; /* committed */
  int64_t accepted, fallbacks, attempts_counted; /* accept rate: accepted / attempts_counted, those up to the winner */
  int64_t attempts, tokens_drawn, rewards;       /* what budgets bound; of tokens and rewards, up to the last round */
  int32_t tried;         /* attempts at the segment being decided whose results were fed */
  int32_t verdict;       /* on it */
  int32_t finish_reason; /* stars_finish_reason */
  int32_t reserved;
} stars_progress;

STARS_API stars_controller* stars_controller_open(const stars_controller_params* params); /* NULL: stars_last_status */
/* Up to `capacity` attempts of the round that begins, into attempts[capacity]; how many, or a status times -1. 0 where
 * the request has ended; stars_controller_progress says why. All of a round must be fed, or the segment committed, before
 * the next is asked for. */
STARS_API int64_t stars_controller_next(stars_controller* controller, stars_attempt* attempts, int64_t capacity);
/* The results of the next `count` attempts that have none, in their order. What follows the winner need not be scored
 * or fed; where it is, it only counts, and a reward of NaN there was not computed. notes[count] or NULL. */
STARS_API int32_t stars_controller_feed(stars_controller* controller, const stars_scored* scored, int64_t count,
                                        stars_note* notes, stars_decision* decision);
STARS_API int32_t stars_controller_commit(stars_controller* controller); /* the winner becomes history */
/* The attempts of the segment being decided are dropped, counted as they are, and the request ends with what was
 * committed. */
STARS_API int32_t stars_controller_abort(stars_controller* controller);
STARS_API int32_t stars_controller_progress(stars_controller* controller, stars_progress* out);
STARS_API int32_t stars_controller_close(stars_controller* controller);

/* -- The ledger of pages: whose a KV cache's pages are, for hosts that keep keys and values by themselves -------------
 *
 * A cache is num_pages pages of page_size positions. The ledger holds numbers alone, 0 .. num_pages - 1: it says which
 * page may be written, which is shared, and which holds a prefix that was read before. A page is free; or in use, with a
 * reference for each holder; or cached: nobody refers to it, but it was published, so that another text that begins
 * alike finds it. Cached pages are handed out when none is free, the one that was given back longest ago first.
 *
 * There are two ways in. A host with block tables of its own calls stars_ledger_alloc, _share and _release. Any other
 * opens a sequence for each text: it keeps the table, and says what must be copied before a shared page is written.
 *
 *   stars_sequence* s = stars_sequence_open(ledger, 0, prompt, count);      // shares what is there of the prompt
 *   at = stars_sequence_length(s);
 *   stars_sequence_extend(s, count - at, &copy);                            // pages for the rest
 *   ... run prompt[at .. count - 1], position p in row p % page_size of page pages[p / page_size] ...
 *   stars_sequence_publish(s, prompt, count);                               // others may share it now
 *   stars_sequence_extend(s, 32, &copy); ... draft; rejected: stars_sequence_rewind(s, count) ...
 *   stars_sequence_close(s, text, length);                                  // published, and given back
 *
 * `key` keeps texts apart whose keys and values differ for the same tokens: of another model, adapter or cache. Arrays
 * of pages are int32 [count] in prefix order; tokens of pages are int32 [count, page_size]. All are read or written
 * during the call alone. A ledger and its sequences have one caller at a time together: another one is STARS_BUSY. What
 * is refused has changed nothing; STARS_EXHAUSTED is more pages than are free and cached together. */
typedef struct stars_ledger stars_ledger;
typedef struct stars_sequence stars_sequence;

typedef struct {
  int64_t size;
  int64_t num_pages; /* may be 0; below 2^31 */
  int64_t page_size; /* positions of a page, at least 1 and below 2^31 */
} stars_ledger_params;

/* A page. `size` is set by the caller, here and below. */
typedef struct {
  int64_t size;
  int64_t references; /* holders, sequences among them */
  int32_t published;  /* 1: found by its prefix */
  int32_t cached;     /* 1: published, without a holder */
} stars_page;

typedef struct {
  int64_t size;
  int64_t free, cached, used; /* pages; together all there are */
  int64_t published;          /* pages that are found by their prefixes, cached or in use */
  int64_t sequences;          /* that are open */
} stars_page_counts;

/* Rows 0 .. rows - 1 of page `source` are to be copied to the same rows of page `target`, in every layer. */
typedef struct {
  int64_t size;
  int32_t source, target, rows;
  int32_t reserved; /* 0 */
} stars_page_copy;

/* All memory that the ledger needs, but for sequences: some 90 bytes a page, and its tokens. */
STARS_API stars_ledger* stars_ledger_open(const stars_ledger_params* params); /* NULL: stars_last_status */
/* STARS_INVALID while sequences of it are open. Pages that the caller still holds are nobody's afterwards. */
STARS_API int32_t stars_ledger_close(stars_ledger* ledger);
/* `count` pages that nobody else refers to, with one reference each, into pages[count]; or STARS_EXHAUSTED. */
STARS_API int32_t stars_ledger_alloc(stars_ledger* ledger, int64_t count, int32_t* pages);
/* One reference more to each of `pages`, which are in use or cached; a page may stand there twice. */
STARS_API int32_t stars_ledger_share(stars_ledger* ledger, const int32_t* pages, int64_t count);
/* One reference less to each. The last page is released first, hence reused first. References of sequences stay. */
STARS_API int32_t stars_ledger_release(stars_ledger* ledger, const int32_t* pages, int64_t count);
/* The pages that hold the longest published prefix of `count` pages of tokens, into pages[count] (or NULL); how many, or
 * a status times -1. They are not taken: share them before anything else is asked. */
STARS_API int64_t stars_ledger_match(stars_ledger* ledger, int64_t key, const int32_t* tokens, int64_t count,
                                     int32_t* pages);
/* Offers `pages`, all in use and holding `tokens` from position 0 on, for sharing. Where another page is published for
 * the same prefix, that one stays and continues it; found[count] (or NULL) are the pages that are found now. */
STARS_API int32_t stars_ledger_publish(stars_ledger* ledger, int64_t key, const int32_t* pages, const int32_t* tokens,
                                       int64_t count, int32_t* found);
/* Gives up `pages`, a chain that was matched, from its end on: as far as nobody refers to them and no prefix goes on from
 * them, they are free. */
STARS_API int32_t stars_ledger_forget(stars_ledger* ledger, const int32_t* pages, int64_t count);
/* `page`, and whatever continues it, is not found any more; what of it was cached is free. */
STARS_API int32_t stars_ledger_unpublish(stars_ledger* ledger, int32_t page);
/* How many of `pages`, all different, stars_ledger_share would take from what can be handed out; or a status times -1. */
STARS_API int64_t stars_ledger_cost(stars_ledger* ledger, const int32_t* pages, int64_t count);
STARS_API int32_t stars_ledger_page(stars_ledger* ledger, int32_t page, stars_page* out);
STARS_API int32_t stars_ledger_counts(stars_ledger* ledger, stars_page_counts* out);
/* STARS_OK where all books balance, or STARS_CORRUPT. `holders`: int64 [num_pages], how often the caller holds each page
 * by stars_ledger_alloc and _share, sequences not counted; NULL is not compared. For tests: it reads everything. */
STARS_API int32_t stars_ledger_check(stars_ledger* ledger, const int64_t* holders);

/* A sequence that shares the longest published prefix of tokens[count], in whole pages, and takes no page: its length is
 * what it shares, and at least the last token is left to run. `tokens` may be NULL where count is 0. */
STARS_API stars_sequence* stars_sequence_open(stars_ledger* ledger, int64_t key, const int32_t* tokens,
                                              int64_t count); /* NULL: stars_last_status */
/* Makes the sequence `tokens` positions longer, whose rows the caller then writes. Returns 1 where a page that others
 * refer to was replaced: `copy` says what to copy before any row is written, of this sequence or another. Else 0, or a
 * status times -1 (STARS_EXHAUSTED: none of the pages was taken). A published page that is written is not found any
 * more. */
STARS_API int32_t stars_sequence_extend(stars_sequence* sequence, int64_t tokens, stars_page_copy* copy);
/* A second sequence with the same positions. It shares all pages; who writes first to the last one gets a copy. */
STARS_API stars_sequence* stars_sequence_fork(stars_sequence* sequence); /* NULL: stars_last_status */
/* Shortens the sequence to `length` positions; pages beyond are given back. */
STARS_API int32_t stars_sequence_rewind(stars_sequence* sequence, int64_t length);
/* Offers the whole pages of tokens[count], which its first positions hold, for sharing. Its own pages stay its own. */
STARS_API int32_t stars_sequence_publish(stars_sequence* sequence, const int32_t* tokens, int64_t count);
/* Gives all pages back. `tokens`: as of stars_sequence_publish, before that; or NULL with count 0. */
STARS_API int32_t stars_sequence_close(stars_sequence* sequence, const int32_t* tokens, int64_t count);
/* Its pages into pages[capacity]; how many, or a status times -1. NULL with capacity 0 only asks how many. */
STARS_API int64_t stars_sequence_pages(stars_sequence* sequence, int32_t* pages, int64_t capacity);
STARS_API int64_t stars_sequence_length(stars_sequence* sequence); /* positions, or a status times -1 */
/* Positions that were there when it was opened or forked, which the caller need not run; or a status times -1. */
STARS_API int64_t stars_sequence_shared(stars_sequence* sequence);

#ifdef __cplusplus
}
#endif

#endif /* STARS_H */
