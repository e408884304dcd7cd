/* deepseek-optimizer native CPU backend: the C interface (training: dso_train.h).
 *
 * Rules of the house
 *  - Pointers, sizes, error codes: no torch, no Python. Loaded through ctypes, which releases the GIL.
 *  - Every function that can fail returns 0 or a DSO_E* code; dso_last_error() gives this thread's message.
 *  - Python describes (graph, rules, buffers, sequences); this library executes: one dso_plan_run a step.
 *  - All weights are borrowed: the caller keeps them alive and unmoved while a plan that names them lives.
 */
#ifndef DSO_H
#define DSO_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define DSO_API __attribute__((visibility("default")))
#else
#define DSO_API
#endif

#define DSO_ABI_VERSION 6
DSO_API int32_t dso_abi_version(void);

enum {
  DSO_OK = 0,
  DSO_EINVAL = 1, /* a bad argument: the message names it */
  DSO_ENOMEM = 2, /* memory could not be had */
  DSO_EISA = 3,   /* the ISA that was asked for is unknown or cannot run here */
  DSO_ESTATE = 4, /* called at the wrong time (a run started from inside a run on the same context) */
  DSO_EFILE = 5,  /* a mapped file that was read is not what it was: "<what happened>: <name>". What was written is worthless */
  DSO_ECHECK = 6, /* a checked context found memory beside a buffer written: a defect of this library */
};
DSO_API const char* dso_last_error(void); /* of the calling thread; never NULL */

/* ---- CPU ------------------------------------------------------------------------------------------------
 * ISA names, best last: "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16" (VNNI and BF16), "amx";
 * and "amx-emulated" (never chosen by itself: AMX code over portable tiles, for tests on hosts without AMX;
 * needs what "avx512-bf16" needs). */
DSO_API int32_t dso_isa_count(void);
DSO_API const char* dso_isa_name(int32_t i);
DSO_API int32_t dso_isa_runs_here(const char* name); /* 1, 0, or -1 for an unknown name */
DSO_API const char* dso_cpu_description(void);       /* JSON: vendor, model name, features found, caches, cores */

/* ---- context: an ISA's kernels and a thread pool ------------------------------------------------------- */
typedef struct dso_context dso_context;
/* isa NULL: the best that runs here. A family name ("avx2", "avx512") means exactly that variant.
 * threads <= 0: affinity and cgroup limits decide. The pool's threads start at the first run and are rebuilt
 * after a fork. A context may be used by several plans, which keep it alive; runs on one context are serialised. */
DSO_API int32_t dso_context_create(const char* isa, int32_t threads, dso_context** out);
DSO_API void dso_context_destroy(dso_context* c);
DSO_API const char* dso_context_isa(const dso_context* c);
DSO_API int32_t dso_context_threads(const dso_context* c);
/* on: plans made on this context from now on keep red zones between their buffers, and a run that finds one written returns
 * DSO_ECHECK and says by which steps. For tests; results are the same. */
DSO_API int32_t dso_context_set_checked(dso_context* c, int32_t on);
DSO_API int32_t dso_default_threads(void); /* min(affinity, ceil(cgroup quota)) */
/* Bytes a second at which the context's threads together read `bytes` (1 MiB at least; taken for the call) over and over:
 * the fastest of the rounds that fit `seconds`, four at least. */
DSO_API int32_t dso_read_bandwidth(dso_context* c, int64_t bytes, double seconds, double* bytes_per_second);

/* ---- mapped files ---------------------------------------------------------------------------------------
 * Weights may lie in a privately mapped file. Once the mapping is registered, a file that is cut short, or that the disk cannot
 * give, kills the process no more: a handler of SIGBUS puts zeros in place of the mapping, and every call that has read weights
 * of it (dso_plan_run, dso_linear, dso_unpack, dso_pack of a source that lies there) returns DSO_EFILE, then and ever after. So
 * it does where the file's size or time of modification is another than when it was opened. The handler is installed with the
 * first mapping, and hands all other faults on to the one before it. */
/* address: where the file is mapped from its first byte on. bytes: its length. fd: of the file, duplicated; -1: only faults are
 * noticed. modified_ns: st_mtim when it was opened. name: for messages. number: for dso_mapping_remove, before it is unmapped.
 */
DSO_API int32_t dso_mapping_add(const void* address, int64_t bytes, int32_t fd, int64_t modified_ns, const char* name,
                                int64_t* number);
DSO_API void dso_mapping_remove(int64_t number);
DSO_API int32_t
dso_mapping_check(const void* address); /* DSO_EFILE where the mapping that holds this address is not what it was */

/* ---- weights --------------------------------------------------------------------------------------------
 * A matrix W[rows, cols] (out features, in features) is packed in tiles of 16 rows x 32 columns, tile row by tile
 * row: tile (i, g) lies at ((i * ceil(cols/32)) + g) * dso_tile_bytes(format). Rows and columns past the end are
 * zero. The layout is the same on every ISA.
 *   F32  2048 B: float   [32 k][16 r]
 *   BF16 1024 B: bf16    [16 k/2][16 r][2]            (AMX and VDPBF16PS order)
 *   INT8  544 B: uint8   [8 k/4][16 r][4] = w + 128, then fp16 scale[16]            w in [-128, 127], W = scale * w
 *   INT4  288 B: uint8   [4 j][16 r][4]: low nibble of byte (j, r, b) is column 8j + b, high nibble 8j + 4 + b,
 *                nibble = w + 8, then fp16 scale[16]                                w in [-8, 7],    W = scale * w
 *   Q4_1  320 B: nibbles as INT4 holding q in [0, 15], then fp16 scale[16], fp16 min[16]          W = scale * q + min
 *   FP8   544 B: E4M3    [16 k/2][16 r][2], then float scale, zeros to 544         W = scale * value. The tiles of a block of
 * 128 x 128 share their scale; it is NaN where one of them has a NaN code (0x7f, 0xff) VECTOR is a plain float[cols] (norm
 * weights, biases, inverse frequencies): rows = 1. A weight may be a stack of `count` matrices of rows x cols (experts, heads),
 * each packed by itself, one after the other. */
enum { DSO_F32 = 0, DSO_BF16 = 1, DSO_INT8 = 2, DSO_INT4 = 3, DSO_Q4_1 = 4, DSO_FP8 = 5, DSO_VECTOR = 100 };
/* Source types of dso_pack. GGML: rows of blocks of the type that holds the format's own numbers, repacked without rounding:
 * Q4_0 for INT4, Q4_1 for Q4_1, Q8_0 for INT8; cols and stride are multiples of 32. */
enum { DSO_SRC_F32 = 0, DSO_SRC_BF16 = 1, DSO_SRC_F16 = 2, DSO_SRC_GGML = 3 };

typedef struct dso_weight {
  int32_t format, rows, cols, count; /* count 0 or 1: one matrix */
  const void* data;
  int64_t bytes; /* of the whole stack; checked against the format and the shape */
} dso_weight;

DSO_API int64_t dso_tile_bytes(int32_t format); /* -1 for an unknown format */
DSO_API int64_t dso_packed_bytes(int32_t format, int64_t rows, int64_t cols);
/* Packs rows [0, rows) of a row-major matrix (row stride `stride` elements); dst holds dso_packed_bytes. INT8: scale =
 * max|w|/127 rounded to fp16, w = rint(W/scale) clamped to +-127. INT4 and Q4_1: of several scales (and minima), in fp16, those
 * of least weighted error; ggml's own comes first, so no group has a larger one than in ggml. The weight of an element's error
 * is importance[column] (float[cols], finite, not negative: the mean square of what the column is multiplied with), or, where
 * importance is NULL, the element's magnitude. Other formats and GGML sources don't read it. FP8: scale = max|W|/448 of each
 * block of 128 x 128, W/scale rounded to nearest even; src begins at a block's first row. Which scales, corner cases and
 * padding: docs/contracts.md, "Packing, bit for bit". Bit-identical to the reference in quant/. */
DSO_API int32_t dso_pack(dso_context* c, int32_t format, int32_t src_type, const void* src, int64_t rows, int64_t cols,
                         int64_t stride, const float* importance, void* dst);
/* FP8 out of what is E4M3 by blocks already: codes [rows, cols] (row stride `stride`) and scales float [ceil(rows/128)]
 * [ceil(cols/128)], dense. Nothing is rounded. */
DSO_API int32_t dso_pack_fp8(dso_context* c, const uint8_t* codes, const float* scales, int64_t rows, int64_t cols,
                             int64_t stride, void* dst);
DSO_API int32_t dso_unpack(dso_context* c, const dso_weight* w, int64_t row_begin, int64_t row_end,
                           float* dst); /* [rows, cols] */

/* ---- one product outside a plan (module forwards, tests) ------------------------------------------------
 * y[T, rows] = x[T, cols] W^T + bias (NULL: none), all fp32 row-major and dense. Same kernels and the same bits as a
 * plan's LINEAR of the same family. activation: the DSO_SLOT_* kind that x is converted to first (F32 for F32, BF16 for BF16
 * and FP8, Q8 or Q16 for the integer formats). decode_rows: how many leading rows run the decode family (the rest: prefill). */
DSO_API int32_t dso_linear(dso_context* c, const dso_weight* w, const float* bias, int32_t activation, const float* x,
                           int64_t T, int64_t decode_rows, float* y);
/* The conversion alone, for tests: rows of x[T, width] to rows of dso_row_bytes(kind, width). */
DSO_API int64_t dso_row_bytes(int32_t slot_kind, int64_t width); /* bytes of a slot's row, a multiple of 64 */
DSO_API int32_t dso_convert(dso_context* c, int32_t slot_kind, const float* x, int64_t T, int64_t width, void* rows);

/* ---- KV cache: blocks of 32 tokens in one growing arena -------------------------------------------------
 * A block holds DSO_BLOCK_TOKENS tokens of ALL layers. Memory is reserved at creation, becomes resident when first
 * written, and goes back with dso_cache_release. The inner layout belongs to the kernels; whole blocks can be copied.
 * Full (rank 0): K and V of kv_heads x head_dim; head_dim is even and at most 256; rope and index are 0.
 * Latent (rank > 0): of a token and layer one row of rank numbers and `rope` more, the same for all heads, and `index` numbers
 * of the lightning indexer's key (0: none). F32 and BF16: the numbers; INT8: rank int8 in groups of 128 with an fp32 scale
 * each, the rope part in bf16; the index key bf16 (fp32 with F32). kv_heads and head_dim are 0. rank, rope and index are
 * multiples of 2. summaries (0 or 1): of every full block, layer and kv head the cache also keeps the element-wise largest and
 * smallest number of its keys (latent: of its rows of rank + rope numbers) as they are stored, rounded to bf16 (F32: fp32).
 * Whatever writes a block's last token, or turns its keys, makes them; a copy of a block copies them; dso_cache_block_bytes
 * counts them. */
#define DSO_BLOCK_TOKENS 32
enum { DSO_KV_F32 = 0, DSO_KV_BF16 = 1, DSO_KV_INT8 = 2 };
typedef struct dso_cache dso_cache;
typedef struct dso_cache_shape {
  int32_t kv_type, layers, kv_heads, head_dim, rank, rope, index, summaries;
} dso_cache_shape;
DSO_API int64_t dso_cache_block_bytes(const dso_cache_shape* shape);
DSO_API int32_t dso_cache_create(const dso_cache_shape* shape, int64_t blocks, dso_cache** out);
DSO_API void dso_cache_destroy(dso_cache* k);
DSO_API int32_t dso_cache_copy_block(dso_cache* k, int32_t from, int32_t to);
DSO_API int32_t dso_cache_release(dso_cache* k, int32_t from_block); /* blocks >= from_block go back to the system */
/* A block's bytes out of the cache and into it, all that steps read of it, for a file: dso_cache_saved_bytes of them. They mean
 * the same in every cache of the same shape, on every ISA. */
DSO_API int64_t dso_cache_saved_bytes(const dso_cache* k);
DSO_API int32_t dso_cache_save_block(const dso_cache* k, int32_t block, void* bytes);
DSO_API int32_t dso_cache_load_block(dso_cache* k, int32_t block, const void* bytes);
/* Reads one layer of a sequence back, for adapters and tests. Full: key and value are float [kv_heads, tokens, head_dim].
 * Latent: key is float [tokens, rank + rope], value float [tokens, index], or NULL. */
DSO_API int32_t dso_cache_read(dso_cache* k, int32_t layer, const int32_t* block_table, int32_t tokens, float* key,
                               float* value);
/* How RoPE turned keys that lie in a cache: numbers [offset, offset + rot) of a key, in pairs (i, i + rot/2) of these, or
 * (2i, 2i + 1) with the INTERLEAVED flag, by position * inv_freq[i] (float[rot/2]). */
typedef struct dso_rotation {
  const float* inv_freq;
  int32_t rot, offset, flags, reserved;
} dso_rotation;
/* Moves cached tokens by `delta` positions: turns the keys of all layers, and nothing else, in the blocks that hold `tokens`
 * tokens; what lies behind the last token is turned with its block. The first token's position is `position`; the others count
 * on from there. Angle of a number: what ROPE_TABLE's fp32 product gives at the new position less what it gives at the old one,
 * in double, so that turns add up to the very angle of the last position, however many there were. Rounding is the storage's
 * own, once a turn; with INT8 each head gets a new scale. A scale of ROPE_TABLE is in the keys, and stays. key: of the heads,
 * or of the rope numbers of a latent; index: of the indexer's key, NULL where the cache has none. Everything is checked before
 * a byte is written. No block may be there twice; whoever shares one must have been given a copy. */
DSO_API int32_t dso_cache_rotate(dso_context* c, dso_cache* k, const dso_rotation* key, const dso_rotation* index,
                                 const int32_t* block_table, int32_t tokens, int32_t position, int32_t delta);

/* ---- plan: a flat list of steps over slots ---------------------------------------------------------------
 * A slot is a buffer whose row count is set by each run: T tokens, or R logit rows for slots after SELECT_ROWS.
 * Kinds of slot: F32 rows; BF16 rows (activations rounded to nearest even); Q8 rows: activations quantised by groups of
 * 32 along the row (width padded to 32): int8 q[wp], float scale[wp/32], int32 sum[wp/32] (sum of q), where
 * scale = max|x|/127, q = rint(x * (127/max|x|)); a group whose factor overflows (zeros, or max|x| below 1e-34) has
 * scale 0 and q = 0; a group with a NaN or infinity has scale NaN and q = 0 (the same for Q16).
 * Q16 rows, for formats whose own error is smaller than int8 activations' (SmolLM2: int8 activations alone cost a KL of
 * 0.003): int8 hi[wp], int8 lo[wp], float scale[wp/32], int32 sum[wp/32] (sum of q), where q = rint(x * (32512/max|x|)),
 * scale = max|x|/32512, hi = (q + 128) >> 8 in [-127, 127], lo = q - 256 hi in [-128, 127].
 * LOGITS is the caller's output buffer (F32 rows of vocab_size, always selected). */
enum { DSO_SLOT_F32 = 0, DSO_SLOT_BF16 = 1, DSO_SLOT_Q8 = 2, DSO_SLOT_Q16 = 3, DSO_SLOT_LOGITS = 4 };
/* selected: rows are the logit rows. repeat: rows a token has (0 or 1: one); row t * repeat + j is token t's j-th. */
typedef struct dso_slot {
  int32_t kind, width, selected, repeat;
} dso_slot;

enum {
  /* in[], out[]: slots. w[], b[]: weights. -1 where absent. "any": F32, BF16, Q8 or Q16. */
  DSO_OP_EMBEDDING = 1,    /* w0[V,H] -> out0 F32; scale multiplies; batch->inputs_embeds replaces the look-up */
  DSO_OP_RMS_NORM = 2,     /* in0 F32, w0 vector, eps -> out0 any. heads > 0: per head of head_dim (q/k norm), F32 */
  DSO_OP_ADD = 3,          /* in0, in1 F32 -> out0 F32 (may alias an input) */
  DSO_OP_ADD_RMS_NORM = 4, /* in0 residual, in1 delta, w0, eps -> out0 = in0 + in1 F32 (may alias in0), out1 = norm(out0) any */
  DSO_OP_CONVERT = 5,      /* in0 F32 -> out0 BF16, Q8 or Q16 */
  DSO_OP_LINEAR = 6,       /* in0, up to 3 matrices over one input (w0..2, b0..2) -> out0..2 F32.
                              in0 must be Q8 or Q16 for INT8, INT4, Q4_1; BF16 for BF16 and FP8; F32 for F32 */
  DSO_OP_ROPE_TABLE = 7,   /* w0 = inverse frequencies vector [rot/2]; scale multiplies -> out0 F32 [T, rot]: cos | sin.
                              angle = fp32(position) * fp32(inv_freq) in fp32, then cos/sin rounded from double */
  DSO_OP_ROPE = 8,        /* in0 F32 [T, heads*head_dim], in1 table -> out0 F32 (may alias). INTERLEAVED flag: pairs (2i, 2i+1).
                             Numbers [offset, offset + rot) of each head turn */
  DSO_OP_CACHE_WRITE = 9, /* in0 key, in1 value (F32, kv_heads*head_dim), layer */
  DSO_OP_ROPE_CACHE =
      10,                /* in0 q, in1 k, in2 v, in3 table -> out0 rotated q (may alias in0); rotated k and v go to the cache */
  DSO_OP_ATTENTION = 11, /* in0 q F32 [T, heads*head_dim], layer, scale, window (0: none) -> out0 any. EAGER flag: score matrix.
                            sinks: with a window, so many tokens at the beginning are seen besides. in1 (or -1), with top_k > 0:
                            F32 [T, kv_heads * top_k] as BLOCK_CHOOSE makes it: of each kv head the blocks that the row's q
                            heads see, and no others; window and sinks are 0 then. Neither goes with EAGER */
  DSO_OP_SWIGLU = 12,    /* in0 gate, in1 up F32 -> out0 any: silu(gate) * up */
  DSO_OP_GATE_UP = 13,   /* in0, w0 gate, w1 up (b0, b1) -> out0 any: silu(W0 x) * (W1 x); formats of w0 and w1 equal */
  DSO_OP_SELECT_ROWS = 14, /* in0 F32 -> out0 F32, a selected slot: rows batch->logit_rows */
  DSO_OP_HIDDEN_OUT = 15,  /* in0 F32 -> batch->hidden + index * T * width, when asked for; index = layer field.
                              LAST flag: also -> batch->last_hidden, when asked for */

  /* Experts. routes: F32 [T, 2 * top_k]: the chosen experts' numbers, ascending, then their weights. */
  DSO_OP_ROUTE = 16, /* in0 F32 scores [T, experts] before softmax or sigmoid, b0 (or -1) -> out0 routes. The choice is by score
                        + b0, in the top_groups best of `groups`; weights are scores * scale. Of equals the lower number goes
                        first; a NaN is the largest, so that it is not lost */
  DSO_OP_EXPERTS_GATE_UP =
      17,                   /* in0 any, in1 routes, w0 stack of 2 * experts (gate, up, gate, up ..) -> out0 any, repeat = top_k.
                          GROUPED flag: rows of out0 lie by expert, in the order that EXPERTS_DOWN of the same routes expects */
  DSO_OP_EXPERTS_DOWN = 18, /* in0 as EXPERTS_GATE_UP made it, in1 routes, w0 stack of experts -> out0 F32: sum over j,
                             ascending, of weight_j * (W x_j). GROUPED flag as there */

  /* Multi-head latent attention over a latent cache. Widths: q is heads * (nope + rope), latents are rank + rope. */
  DSO_OP_LATENT = 19, /* in0 F32 [T, rank + rope], in1 table, w0 vector [rank], eps -> out0 F32: norm of the first rank numbers,
                         then the others turned. INTERLEAVED flag */
  DSO_OP_LATENT_WRITE = 20, /* in0 F32 [T, rank + rope], layer */
  DSO_OP_MLA_ABSORB =
      21, /* in0 q F32, w0 stack of heads [rank, nope] (F32 or BF16) -> out0 F32 [T, heads * (rank + rope)]: of each head
             W q_nope, then q_rope as it is; rows that MLA_ATTENTION will expand are left as they are */
  DSO_OP_MLA_ATTENTION = 22, /* in0 q, in1 what MLA_ABSORB made, in2 chosen tokens F32 (or -1), w0 kv_b [heads * (nope + v_dim),
                             rank] any format, layer, scale -> out0 F32 [T, heads * rank] weighted sums of latents of absorbed
                             rows, out1 F32 [T, heads * v_dim] of expanded ones. EXPAND flag: every row is expanded, and in1,
                             out0 are -1. top_k > 0: sparse. in2 [T, top_k] as INDEX_CHOOSE makes it is read of rows that see
                             more tokens than that; the others see all. window, sinks: as ATTENTION has them, and not beside
                             top_k. The steps around it, MLA_ABSORB and MLA_VALUE, have the same top_k, window and sinks */
  DSO_OP_MLA_VALUE = 23, /* in0 sums of latents, in1 what MLA_ATTENTION made of expanded rows, w0 stack of heads [v_dim, rank]
                            -> out0 any [T, heads * v_dim] */
  /* The lightning indexer. */
  DSO_OP_LAYER_NORM = 24,  /* in0 F32, w0 vector, b0 vector, eps -> out0 any */
  DSO_OP_INDEX_WRITE = 25, /* in0 F32 [T, index], layer */
  DSO_OP_INDEX_CHOOSE =
      26, /* in0 q F32 [T, heads * index], in1 F32 [T, heads], layer, top_k, scale -> out0 F32 [T, top_k]: the visible
           tokens of largest scale * sum over h of w_h relu(q_h . k), ascending, of equal scores the earlier token,
           and NaN counts as infinity; all where there are no more than top_k; -1 behind the last */
  /* MTP layers. */
  DSO_OP_STATE_IN = 27, /* batch->states -> out0 F32 */
  DSO_OP_CONCAT = 28,   /* in0, in1 F32 -> out0 any: in0's numbers, then in1's */
  /* Which tokens a row attends to. A row that is token i of its sequence (the first is 0) sees blocks [0, n) of 32 tokens,
     n = i / 32 + 1. With n <= top_k all of them are chosen. Otherwise blocks [0, S), S = ceil(sinks / 32), and [W, n),
     W = max(0, i + 1 - window) / 32, are; and of those between, as many of the largest estimate as make it top_k in all, of
     equal ones the earlier. S + ceil(window / 32) + 1 < top_k. The estimate (Tang et al. 2024, Quest) of q head h and block b:
     e = sum over d of max(q_d largest_d, q_d smallest_d), with the cache's summaries; of a group of heads the largest of
     e_h - (largest e_h of the blocks between). */
  DSO_OP_BLOCK_CHOOSE = 29, /* in0 q F32 [T, heads*head_dim], layer, heads, kv_heads, head_dim, top_k, window, sinks -> out0 F32
                             [T, kv_heads * top_k]: numbers of blocks of the sequence, ascending, -1 behind the last */
  DSO_OP_LATENT_CHOOSE =
      30, /* in0 what MLA_ABSORB made, layer, heads, top_k, window, sinks -> out0 F32 [T, 32 * top_k]: the tokens up
          to i of the chosen blocks, ascending, -1 behind the last; all heads are one group. For MLA_ATTENTION's in2 */
};
enum {
  DSO_FLAG_EAGER = 1,
  DSO_FLAG_INTERLEAVED = 2,
  DSO_FLAG_GROUPED = 4,
  DSO_FLAG_EXPAND = 8,
  DSO_FLAG_LAST = 16,
  DSO_FLAG_SIGMOID = 32,   /* ROUTE: scores are sigmoids, not a softmax */
  DSO_FLAG_TOP2 = 64,      /* ROUTE: a group's score is the sum of its best two, not its best */
  DSO_FLAG_NORMALISE = 128 /* ROUTE: weights are divided by their sum */
};

typedef struct dso_step {
  int32_t op, flags;
  int32_t in[4], out[3], w[3], b[3];
  int32_t layer, heads, kv_heads, head_dim, window, sinks;
  int32_t offset;                         /* ROPE: where in a head the numbers that turn begin */
  int32_t nope, rope, rank, v_dim, index; /* latent attention */
  int32_t experts, top_k, groups, top_groups;
  float eps, scale;
} dso_step;

typedef struct dso_plan dso_plan;
DSO_API int32_t dso_plan_create(dso_context* c, const dso_step* steps, int32_t n_steps, const dso_slot* slots, int32_t n_slots,
                                const dso_weight* weights, int32_t n_weights, int32_t vocab_size, dso_plan** out);
DSO_API void dso_plan_destroy(dso_plan* p);
DSO_API int64_t dso_plan_buffer_bytes(const dso_plan* p, int32_t T,
                                      int32_t R);                    /* what the slots take for T tokens, R logit rows */
DSO_API int32_t dso_plan_reserve(dso_plan* p, int32_t T, int32_t R); /* sizes the arena ahead of a run */

/* A ragged batch. Sequences in DECODE phase come first, then those in PREFILL; rows of a sequence are consecutive.
 * Everything is checked before anything is written: ids inside the vocabulary, block ids inside the cache, lengths. */
enum { DSO_PHASE_DECODE = 0, DSO_PHASE_PREFILL = 1 };
typedef struct dso_batch {
  int32_t T, S, R, max_blocks;
  const int32_t* token_ids;   /* [T]; NULL only with inputs_embeds */
  const int32_t* positions;   /* [T]: for RoPE only; attention order is the order in the cache */
  const int32_t* query_len;   /* [S], sum T, each > 0 */
  const int32_t* context_len; /* [S]: tokens in the cache before this step */
  const int32_t* phase;       /* [S], ascending */
  const int32_t* block_table; /* [S, max_blocks]: blocks for context_len + query_len tokens. -1 is allowed for a block that no
                                 row of this step sees, where every layer of the plan has a window */
  const int32_t* logit_rows;  /* [R], ascending */
  const float* inputs_embeds; /* [T, H] or NULL */
  const float* states;        /* [T, H]: what STATE_IN gives; NULL for plans without it */
  float* logits;              /* [R, vocab_size] */
  float* hidden;              /* [n_hidden, T, H] or NULL */
  float* last_hidden;         /* [T, H]: the normed last state alone, or NULL */
  dso_cache* cache;           /* NULL only for plans without attention */
  const float* inv_freq; /* [S, rot/2]: of each sequence, for ROPE_TABLE in place of its w0; NULL: w0 for all. Only for plans
                            with one ROPE_TABLE */
} dso_batch;
DSO_API int32_t dso_plan_run(dso_plan* p, const dso_batch* batch);
DSO_API int32_t dso_plan_check(const dso_plan* p); /* dso_mapping_check of all its weights */

/* With timing on, seconds spent in each step summed over runs (wall time on thread 0), and runs counted. */
DSO_API int32_t dso_plan_set_timing(dso_plan* p, int32_t on);
DSO_API int32_t dso_plan_timing(const dso_plan* p, double* seconds_per_step, int64_t* runs);
#ifdef __cplusplus
}
#endif
#endif
