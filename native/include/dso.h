/* deepseek-optimizer native CPU backend: the C interface (training: dso_train.h).
 *
 * Conventions
 *  - Plain pointers, sizes and error codes; no dependency on torch or Python. Loaded through ctypes, which releases the GIL.
 *  - Every function that can fail returns DSO_OK (0) or another DSO_E* code; dso_last_error() returns this thread's message.
 *    Those that return a number of bytes or threads return minus the code.
 *  - Python describes the graph, its rewrites, buffers and sequences; this library executes one dso_plan_run per step.
 *  - All weights are borrowed: the caller keeps them alive and unmoved for as long as a plan that uses them exists. */
#ifndef DSO_H
#define DSO_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#ifdef _WIN32
#define DSO_API __declspec(dllexport)
#else
#define DSO_API __attribute__((visibility("default")))
#endif
#else
#define DSO_API
#endif

#define DSO_ABI_VERSION 20
DSO_API int32_t dso_abi_version(void);

enum {
  DSO_OK = 0,
  DSO_EINVAL = 1, /* invalid argument: the message names it */
  DSO_ENOMEM = 2, /* out of memory */
  DSO_EISA = 3,   /* the requested ISA is unknown or cannot run on this CPU */
  DSO_ESTATE = 4, /* invalid state (a run was started from inside a run on the same context) */
  DSO_EFILE = 5,  /* a mapped file that was read has changed or failed: "<what happened>: <name>". The output is invalid */
  DSO_ECHECK = 6, /* a checked context detected a write outside a buffer: a bug in this library */
  DSO_ELOST = 7,  /* a process of the context's group has ended, so its plans cannot run any more */
};
DSO_API const char* dso_last_error(void); /* of the calling thread; never NULL */

/* ---- CPU ------------------------------------------------------------------------------------------------
 * ISA names, best last. x86: "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-bf16" (VNNI and BF16), "amx", "amx-emulated"
 * (never chosen automatically: the AMX code over portable tiles, for tests; requires what "avx512-bf16" requires). ARM: "neon",
 * "neon-dotprod", "neon-i8mm" (and BF16). */
DSO_API int32_t dso_isa_count(void);
DSO_API const char* dso_isa_name(int32_t i);
DSO_API int32_t dso_isa_runs_here(const char* name); /* 1, 0, or -1 for an unknown name */
DSO_API const char* dso_cpu_description(void);       /* JSON: vendor, model name, detected features, caches, cores;
                                                        NULL without memory */

/* A CPU of a machine. number: the system's. CPUs with equal numbers of core, l3 or package share it; node: the system's number
 * of the memory that is nearest. capacity: relative speed of its core, 1024 for the fastest. What the system does not report is
 * equal for all CPUs, and every CPU is then a core. */
typedef struct dso_cpu {
  int32_t number, core, l3, node, package, capacity;
} dso_cpu;
/* The CPUs that this process may use (its affinity), by number: returns how many; the first `most` are written to `out`. */
DSO_API int32_t dso_topology(dso_cpu* out, int32_t most);
DSO_API int32_t dso_usable_cpus(void);     /* min(CPUs of the affinity, ceil(cgroup quota)) */
DSO_API int32_t dso_default_threads(void); /* min(their cores, ceil(cgroup quota)): one thread per core */

/* ---- context: an ISA's kernels and a thread pool ------------------------------------------------------- */
typedef struct dso_context dso_context;
/* isa: NULL selects the best ISA that runs on this CPU; a family name ("avx2", "neon") selects exactly that variant. threads
 * <= 0: dso_default_threads. The pool's threads start with the first run and are recreated after a fork. A
 * context may be shared by several plans, which keep it alive; runs on one context are serialized. */
DSO_API int32_t dso_context_create(const char* isa, int32_t threads, dso_context** out);
/* The same on a machine with several memory nodes. Without cpus: on this machine's CPUs, whose threads are bound to the CPUs of
 * their nodes. cpus: as if they were the machine's, to try what the library would do there: threads <= 0: one per core; nothing
 * is bound, and what would be asked of the system is recorded only.
 * nodes: what happens if the threads are on several nodes. OFF: nothing. MOVE: the threads of a node compute fixed rows of each
 * matrix, and a plan's first run moves the pages with these rows to the node. COPY: as MOVE, but pages of mapped files are
 * copied. dso_context_create: MOVE. */
enum { DSO_NODES_OFF = 0, DSO_NODES_MOVE = 1, DSO_NODES_COPY = 2 };
DSO_API int32_t dso_context_create_on(const char* isa, int32_t threads, const dso_cpu* cpus, int32_t n_cpus, int32_t nodes,
                                      dso_context** out);
/* Threads of each memory node, ascending by its number: returns how many nodes; the first `most` are written to `threads`. With
 * one, the context does not use nodes. */
DSO_API int32_t dso_context_nodes(const dso_context* c, int32_t* threads, int32_t most);
DSO_API void dso_context_destroy(dso_context* c);
DSO_API const char* dso_context_isa(const dso_context* c);
DSO_API int32_t dso_context_threads(const dso_context* c);
/* With `on`, plans created on this context from now on keep red zones between their buffers, and a run that finds a red zone
 * overwritten returns DSO_ECHECK and names the steps that wrote to it. For tests; results do not change. */
DSO_API int32_t dso_context_set_checked(dso_context* c, int32_t on);
/* Measures memory bandwidth: bytes per second at which the context's threads together read a buffer of `bytes` (at least 1
 * MiB, allocated for the call) repeatedly. Returns the fastest of the rounds that fit into `seconds`, at least four. */
DSO_API int32_t dso_read_bandwidth(dso_context* c, int64_t bytes, double seconds, double* bytes_per_second);
/* The same for memory of the caller: `count` regions, at least 1 MiB together, each read by one thread or by several. Where a
 * machine's memory is not equally fast everywhere, this is the limit of a program that reads these regions. */
DSO_API int32_t dso_read_bandwidth_of(dso_context* c, const void* const* starts, const int64_t* sizes, int32_t count,
                                      double seconds, double* bytes_per_second);

/* ---- groups: one model in several processes --------------------------------------------------------------
 * The processes have ranks from 0; rank 0 is the leader. Their plans exchange rows (DSO_OP_PUBLISH), through memory that the
 * processes of one machine share, or through connections. A process that waits for another one finds out if that has ended: a
 * call that waits, and every later one, returns DSO_ELOST.
 *
 * Shared memory: rank 0 starts the others, and each calls dso_group_create with the same memory and its own rank. Rank 0 sends
 * bytes to all others. It says that one has ended (dso_group_lose), and they notice within a quarter of a second that their
 * parent is gone.
 *
 * Connections: each process has two to each other one, and calls dso_group_connect. */
typedef struct dso_group dso_group;
/* fd: an empty file in memory that all processes of the group share (memfd_create); duplicated by the call. */
DSO_API int32_t dso_group_create(int32_t fd, int32_t rank, int32_t ranks, dso_group** out);
/* data: [ranks], connected stream sockets, for rows only. alive: [ranks], further connections to the same processes, whose
 * failure (not their end) tells that a machine is gone; -1: none. Those of this rank are not read. Duplicated by the call.
 * Where there are no such sockets (other systems than Linux): DSO_EINVAL. */
DSO_API int32_t dso_group_connect(const int32_t* data, const int32_t* alive, int32_t rank, int32_t ranks, dso_group** out);
DSO_API void dso_group_destroy(dso_group* g);
/* With shared memory. */
DSO_API int32_t dso_group_send(dso_group* g, const void* data, int64_t bytes); /* rank 0: to all others, which receive the same
                                                                                  bytes in the same order */
DSO_API int32_t dso_group_receive(dso_group* g, void* data, int64_t bytes);    /* other ranks; waits for as many bytes */
DSO_API int32_t dso_group_lose(dso_group* g, int32_t rank);                    /* says that this process has ended */
DSO_API int32_t dso_group_lost(dso_group* g);                                  /* rank of the first process that ended, or -1 */
/* Plans that are created on the context from now on belong to the group. */
DSO_API int32_t dso_context_join(dso_context* c, dso_group* g);

/* ---- attention outside a plan ---------------------------------------------------------------------------
 * o = softmax(scale q k^T + mask) v over keys and values that the caller keeps, in fp32; with more than a few queries, products
 * of bf16 tensors are those of bf16, and so are those of fp32 tensors that are `rounded`. q is [batch, heads, queries,
 * qk_width], k and v are [batch, kv_heads, keys, qk_width and v_width], o is [batch, heads, queries, v_width], all of one type;
 * query head h reads kv head h / (heads / kv_heads). A mask is [batch, heads, queries, keys]: bytes, of which 0 hides a key, or
 * numbers of that type, which are added. CAUSAL: query i sees keys up to i + keys - queries, and `mask` is not read. A query
 * whose keys are all hidden gets zeros; one to whose keys the lowest finite number is added gets the mean of the values.
 */
enum { DSO_TYPE_F32 = 0, DSO_TYPE_BF16 = 1 };
enum { DSO_MASK_NONE = 0, DSO_MASK_BYTES = 1, DSO_MASK_NUMBERS = 2, DSO_MASK_CAUSAL = 3 };
typedef struct dso_dense_heads {
  void* data;
  int64_t batch, head, token; /* strides in elements, of a mask: 0 where it is shared; the elements of a token are contiguous */
} dso_dense_heads;
typedef struct dso_dense_attention {
  int32_t type, mask_type; /* DSO_TYPE_*, DSO_MASK_* */
  int64_t batch, heads, kv_heads, queries, keys, qk_width, v_width;
  dso_dense_heads q, k, v, o, mask;
  float scale;
  int32_t rounded; /* of fp32 tensors: 1: q, k, v and the weights may be rounded to bf16 */
} dso_dense_attention;
DSO_API int32_t dso_attend(dso_context* c, const dso_dense_attention* a);

/* ---- mapped files ---------------------------------------------------------------------------------------
 * Weights may lie in a privately mapped file. Once the mapping is registered, a file that is truncated, or that the disk fails
 * to read, no longer kills the process: a SIGBUS handler replaces the mapping with zeros, and every later call that reads
 * weights from it (dso_plan_run, dso_linear, dso_unpack, dso_pack of a source in the mapping) returns DSO_EFILE, permanently.
 * The same happens if the file's size or modification time has changed since it was opened. The handler is installed with the
 * first mapping and forwards all other faults to the previous handler. */
/* address: start of the mapping, which begins at the file's first byte. bytes: its length. fd: file descriptor, duplicated by
 * the call; -1: only faults are detected. modified_ns: st_mtim when the file was opened. name: used in messages. number:
 * receives the handle for dso_mapping_remove, which must be called before the mapping is unmapped. */
DSO_API int32_t dso_mapping_add(const void* address, int64_t bytes, int32_t fd, int64_t modified_ns, const char* name,
                                int64_t* number);
DSO_API void dso_mapping_remove(int64_t number);
DSO_API int32_t dso_mapping_check(const void* address); /* DSO_EFILE if the file behind the mapping that contains this address
                                                           has changed or failed */

/* ---- weights --------------------------------------------------------------------------------------------
 * A matrix W[rows, cols] (out features, in features) is packed in tiles of 16 rows x 32 columns, tile row by tile row: tile
 * (i, g) starts at byte ((i * ceil(cols/32)) + g) * dso_tile_bytes(format). Rows and columns past the end are zero. The layout
 * is the same on every ISA. In Q2_K to Q6_K and IQ4_XS, 8 tiles form a superblock of 256 columns, and cols is a multiple of it.
 *   F32  2048 B: float   [32 k][16 r]
 *   BF16 1024 B: bf16    [16 k/2][16 r][2]            (AMX and VDPBF16PS order)
 *   INT8  544 B: uint8   [8 k/4][16 r][4] = w + 128, then fp16 scale[16]            w in [-128, 127], W = scale * w
 *   INT4  288 B: uint8   [4 j][16 r][4]: low nibble of byte (j, r, b) is column 8j + b, high nibble 8j + 4 + b,
 *                nibble = w + 8, then fp16 scale[16]                                w in [-8, 7],    W = scale * w
 *   Q4_1  320 B: nibbles as INT4 holding q in [0, 15], then fp16 scale[16], fp16 min[16]          W = scale * q + min
 *   FP8   544 B: E4M3    [8 k/4][16 r][4] of columns 4j, 4j + 2, 4j + 1, 4j + 3, then float scale, zeros    W = scale * value.
 *                The tiles of a 128 x 128 block share one scale, which is NaN if any of them has a NaN code (0x7f, 0xff)
 * The other formats hold the values of the ggml type of the same name. Their codes are in planes: a plane of b bits is uint8
 * [b][16 r][4], where bits b * i to b * i + b - 1 of byte (v, r, c) belong to column 4 * (8 / b * v + i) + c; `value` is
 * kvalues_iq4nl[code] or kvalues_mxfp4[code] of ggml.
 *   Q5_0   352 B: planes of 4 and 1 bits, code = low + 16 high, then fp16 scale[16]    W = scale * (code - 16)
 *   Q5_1   384 B: planes as Q5_0, then fp16 scale[16], fp16 min[16]                    W = scale * code + min
 *   IQ4_NL 288 B: a plane of 4 bits, then fp16 scale[16]                               W = scale * value
 *   MXFP4  272 B: a plane of 4 bits, then uint8 e[16]                                  W = 2^(e - 128) * value
 *   INT3   208 B: a plane u of 2 bits, then uint8 [16 r][4], where bit t of byte (r, c) is bit p = 8c + t of a circle h of
 *                32 bits and belongs to column 4 q[t] + c, q = {1, 3, 0, 2, 5, 7, 4, 6}, then uint8 s[16], the fp16 number
 *                with bits s << 7. W = s * v[4 u + h[p] + 2 h[p + 1]] for even p, s * v[4 u + g[p - 1] + 2 g[p]] for odd p,
 *                with g[p] = h[p + 1] ^ h[p - 3] and v = +-{1, 4, 6, 9, 13, 18, 24, 31}, ascending
 *   INT8_NESTED 544 B: a row of tiles begins with the tiles of an INT4 matrix, of 288 bytes, whose nibbles are the upper 4 bits
 *                of a code in [8, 255]; then follows for each tile a plane of the lower 4 bits, uint8 [4 j][16 r][4] in the
 *                same order.                                                         W = scale / 16 * (code - 136)
 *   INT4_NESTED 544 B: the INT4 matrix in INT8_NESTED: the same bytes, whose planes at the end of the rows are not read
 * A superblock (8 dso_tile_bytes) is fp16 d[16], fp16 dmin[16] if there are minimums, and 8 groups of 32 columns:
 *   Q4_K   296 B: a plane of 4 bits, int8 scale[16], int8 min[16]                      W = d * scale * code + dmin * min
 *   Q5_K   360 B: planes as Q5_0, then as Q4_K                                         W = d * scale * code + dmin * min
 *   IQ4_XS 276 B: a plane of 4 bits, int8 scale[16]                                    W = d * scale * value
 * or, with a scale for each 16 columns:
 *   Q6_K   420 B: planes of 4 and 2 bits, code = low + 16 high, int8 scale[2][16]      W = d * scale * (code - 32)
 *   Q3_K   228 B: planes of 2 and 1 bits, code = low + 4 high, int8 scale[2][16]       W = d * scale * (code - 4)
 *   Q2_K   168 B: a plane of 2 bits, uint8 [2][16] = scale + 16 min                    W = d * scale * code + dmin * min
 * VECTOR is a plain float[cols] (norm weights, biases, inverse frequencies) with rows = 1. A weight may be a stack of `count`
 * matrices of rows x cols (experts, heads), each packed separately and stored consecutively. */
enum {
  DSO_F32 = 0,
  DSO_BF16 = 1,
  DSO_INT8 = 2,
  DSO_INT4 = 3,
  DSO_Q4_1 = 4,
  DSO_FP8 = 5,
  DSO_Q2_K = 6,
  DSO_Q3_K = 7,
  DSO_Q4_K = 8,
  DSO_Q5_K = 9,
  DSO_Q6_K = 10,
  DSO_IQ4_XS = 11,
  DSO_IQ4_NL = 12,
  DSO_Q5_0 = 13,
  DSO_Q5_1 = 14,
  DSO_MXFP4 = 15,
  DSO_INT3 = 16,
  DSO_INT8_NESTED = 17,
  DSO_INT4_NESTED = 18,
  DSO_VECTOR = 100
};
/* Source types of dso_pack. GGML: rows of blocks of the ggml type whose integer codes the format can hold, repacked without
 * rounding: Q4_0 for INT4, Q8_0 for INT8, and for the others the type of the same name; cols and stride must be multiples of 32
 * or of the superblock. It is the only source of the formats from Q2_K to MXFP4, and none of INT3. */
enum { DSO_SRC_F32 = 0, DSO_SRC_BF16 = 1, DSO_SRC_F16 = 2, DSO_SRC_GGML = 3 };

typedef struct dso_weight {
  int32_t format, rows, cols, count; /* count 0 or 1: one matrix */
  const void* data;
  int64_t bytes; /* of the whole stack; checked against the format and the shape */
} dso_weight;

DSO_API int64_t dso_tile_bytes(int32_t format); /* -1 for an unknown format */
DSO_API int64_t dso_packed_bytes(int32_t format, int64_t rows, int64_t cols);
/* Packs rows [0, rows) of a row-major matrix (row stride `stride` elements) into dst, which holds dso_packed_bytes. INT8:
 * scale = max|w|/127 rounded to fp16, w = rint(W/scale) clamped to +-127. INT4 and Q4_1: of several candidate scales (and
 * minima), in fp16, those with the smallest weighted error; ggml's own choice is the first candidate, so no group has a larger
 * error than in ggml. An element's error is weighted by importance[column] (float[cols], finite, not negative: the mean square
 * of the activations that multiply the column), or, if importance is NULL, by the element's magnitude. Other formats and GGML
 * sources ignore it. FP8: scale = max|W|/448 of each block of 128 x 128, W/scale rounded to nearest even; src starts at a
 * block's first row. INT8_NESTED and INT4_NESTED give the same bytes. Candidate scales, corner cases and padding:
 * docs/contracts.md, "Packing, bit for bit". Bit-identical to the reference in quant/. */
DSO_API int32_t dso_pack(dso_context* c, int32_t format, int32_t src_type, const void* src, int64_t rows, int64_t cols,
                         int64_t stride, const float* importance, void* dst);
/* Packs FP8 from weights that are already block-scaled E4M3: codes [rows, cols] (row stride `stride`) and scales float
 * [ceil(rows/128)][ceil(cols/128)], dense. Nothing is rounded. */
DSO_API int32_t dso_pack_fp8(dso_context* c, const uint8_t* codes, const float* scales, int64_t rows, int64_t cols,
                             int64_t stride, void* dst);
DSO_API int32_t dso_unpack(dso_context* c, const dso_weight* w, int64_t row_begin, int64_t row_end,
                           float* dst); /* [rows, cols] */

/* ---- one product outside a plan (module forwards, tests) ------------------------------------------------
 * y[T, rows] = x[T, cols] W^T + bias (NULL: none), all fp32, row-major and dense. Uses the kernels of a plan's LINEAR of the
 * same family, with bitwise equal results. activation: the DSO_SLOT_* kind that x is converted to first (F32 for F32, BF16 for
 * BF16 and FP8, Q8 or Q16 for the integer formats). decode_rows: number of leading rows computed by the decode family (the
 * others: prefill). */
DSO_API int32_t dso_linear(dso_context* c, const dso_weight* w, const float* bias, int32_t activation, const float* x,
                           int64_t T, int64_t decode_rows, float* y);
/* The same for rows that dso_convert wrote, of kind `activation`: for several products of the same rows. */
DSO_API int32_t dso_linear_rows(dso_context* c, const dso_weight* w, const float* bias, int32_t activation, const void* rows,
                                int64_t T, int64_t decode_rows, float* y);
/* y[T, down.rows] = W_down act(W_up x + b_up) + b_down, where act is the element-wise op `op` with one input; with `gate`, a
 * matrix of the shape of `up`, act(W_gate x + b_gate, W_up x + b_up) of an op with two. x and y are fp32, row-major and dense.
 * With norm_weight [up.cols], the products read the norm of x instead (dso_norm); with `residual`, x is added to the result.
 * Bitwise equal to norm, products, op and addition one after the other. activation, inner: the kinds of rows that the first and
 * the second product read. */
typedef struct dso_feed_forward {
  const dso_weight *gate, *up, *down; /* gate: NULL without one */
  const float *gate_bias, *up_bias, *down_bias;
  const float *norm_weight, *norm_bias;
  int32_t op, activation, inner, residual;
  float eps;
  int32_t reserved;
} dso_feed_forward;
DSO_API int32_t dso_run_feed_forward(dso_context* c, const dso_feed_forward* f, const float* x, int64_t T, float* y);
/* The norm of each row of x[T, width], dense, by the kernels of a plan's LAYER_NORM, or without a bias of its RMS_NORM. */
DSO_API int32_t dso_norm(dso_context* c, const float* x, int64_t T, int64_t width, const float* weight, const float* bias,
                         float eps, float* y);
/* The conversion alone: rows of x[T, width] to rows of dso_row_bytes(kind, width) bytes. */
DSO_API int64_t dso_row_bytes(int32_t slot_kind, int64_t width); /* bytes of a row of a slot, a multiple of 64 */
DSO_API int32_t dso_convert(dso_context* c, int32_t slot_kind, const float* x, int64_t T, int64_t width, void* rows);

/* ---- KV cache: blocks of 32 tokens in one growing arena -------------------------------------------------
 * A block holds DSO_BLOCK_TOKENS tokens of all layers of one group. Memory is reserved at creation, becomes resident when first
 * written, and is returned to the system by dso_cache_release. The inner layout is private to the kernels; whole blocks can be
 * copied. Any block can serve any group: its size is that of the largest one. A sequence has a block table for each group.
 * Full (rank 0): K and V of kv_heads x head_dim; head_dim is even and at most 512; rope and index are 0. If layers differ,
 * `heads` holds kv_heads and head_dim of each layer, and those two fields are 0; otherwise it is NULL.
 * Latent (rank > 0; heads is NULL): per token and layer, one row of `rank` elements and `rope` more, shared by all heads, and
 * `index` elements of the lightning indexer's key (0: none). F32 and BF16: the elements; INT8: rank int8 in groups of 128 with
 * an fp32 scale each, the rope part in bf16; INT4: rank 4-bit codes in groups of 128 with an fp32 scale each, the rope part in
 * int8 with an fp32 scale. The index key is bf16 (fp32 with F32). kv_heads and head_dim are 0. rank, rope and index are
 * multiples of 2.
 * Rows (rows is not NULL; the fields from kv_heads to heads, and newest, are 0 or NULL): kinds of rows, each in the place of a
 * layer. The row of `every` tokens is stored with the last of them: that of tokens up to t is number t % 32 / every in the
 * block of t. A row is stored as a latent of as many elements, a multiple of 2, is.
 * summaries (0 or 1): for every full block, layer and kv head the cache also stores the element-wise maximum and minimum of
 * its keys (latent: of its rows of rank + rope elements) as stored, rounded to bf16 (F32: fp32). They are computed when a
 * block's last token is written or its keys are rotated, and copied with the block; dso_cache_block_bytes includes them. */
#define DSO_BLOCK_TOKENS 32
enum { DSO_KV_F32 = 0, DSO_KV_BF16 = 1, DSO_KV_INT8 = 2, DSO_KV_INT4 = 3 };
typedef struct dso_cache dso_cache;
typedef struct dso_cache_shape {
  int32_t kv_type, layers, kv_heads, head_dim, rank, rope, index, summaries;
  const int32_t* heads;  /* [layers][2] or NULL; read only during the call */
  const int32_t* groups; /* [layers]: the group of each layer, from 0 without gaps; NULL: all in group 0, as they must be with
                            summaries. Read only during the call */
  int32_t newest;        /* attention reads each sequence's last `newest` tokens from copies of the layers in INT8; 0: there are
                            none, as there must be with latents and with summaries */
  const int32_t* newest_groups; /* [layers]: the group of each layer's copy, none of which has a layer itself; numbered after
                                   those; NULL with newest 0. Read only during the call */
  const int32_t* rows; /* NULL, or [layers][3]: `layers` kinds of rows, each {elements of a row, tokens that share one, 1
                          if rows are stored as kv_type says, 0 if in bf16 (fp32 with F32)} */
} dso_cache_shape;
DSO_API int64_t dso_cache_block_bytes(const dso_cache_shape* shape);
DSO_API int32_t dso_cache_create(const dso_cache_shape* shape, int64_t blocks, dso_cache** out);
DSO_API void dso_cache_destroy(dso_cache* k);
DSO_API int32_t dso_cache_copy_block(dso_cache* k, int32_t from, int32_t to);
DSO_API int32_t dso_cache_release(dso_cache* k, int32_t from_block); /* blocks >= from_block go back to the system */
/* Saving and restoring blocks in a file: a block's content is all that steps read from it, dso_cache_saved_bytes bytes. It is
 * interchangeable between caches of the same shape, on every ISA. */
DSO_API int64_t dso_cache_saved_bytes(const dso_cache* k);
DSO_API int32_t dso_cache_save_block(const dso_cache* k, int32_t block, void* bytes);
DSO_API int32_t dso_cache_load_block(dso_cache* k, int32_t block, const void* bytes);
/* Reads one layer of a sequence, for adapters and tests; block_table is that of the layer's group. Full: key and value are
 * float [kv_heads, tokens, head_dim]. Latent: key is float [tokens, rank + rope], value float [tokens, index] or NULL.
 * Rows: key is float [tokens / every, elements], value NULL. */
DSO_API int32_t dso_cache_read(dso_cache* k, int32_t layer, const int32_t* block_table, int32_t tokens, float* key,
                               float* value);
/* How RoPE rotated the keys in a cache: elements [offset, offset + rot) of a key, in pairs (i, i + rot/2) of that range, or
 * (2i, 2i + 1) with the INTERLEAVED flag, by position * inv_freq[i] (float[rot/2]). */
typedef struct dso_rotation {
  const float* inv_freq;
  int32_t rot, offset, flags, reserved;
} dso_rotation;
/* Moves cached tokens by `delta` positions: rotates the keys of all layers of a group in its blocks for `tokens` tokens, and
 * changes nothing else; slots after the last token are rotated along with their block. The first token's position is
 * `position`; the others follow consecutively. An element's angle is the difference between ROPE_TABLE's fp32 products at the
 * new and the old position, taken in double, so that repeated rotations add up to exactly the angle of the final position.
 * Each rotation rounds once to the storage type; with INT8 and INT4 each head gets a new scale. A ROPE_TABLE scale is part of
 * the keys and stays. key: the rotation of the heads, or of the rope elements of a latent; index: that of the indexer's key,
 * NULL if the cache has none. All arguments are checked before anything is written. No block may occur twice in block_table,
 * and blocks shared with another sequence must be copied first. */
DSO_API int32_t dso_cache_rotate(dso_context* c, dso_cache* k, const dso_rotation* key, const dso_rotation* index,
                                 int32_t group, const int32_t* block_table, int32_t tokens, int32_t position, int32_t delta);

/* ---- recurrent states -----------------------------------------------------------------------------------
 * A sequence has one fp32 state of each shape, whatever its length. A slot holds all states of one sequence after some number
 * of its tokens. Memory is reserved at creation, becomes resident when first written, and is returned to the system by
 * dso_states_release. A state of `heads` matrices [rows, cols] is stored in tiles of 16 columns:
 * [heads][ceil(cols/16)][rows][16]; columns past the end are undefined. The layout is the same on every ISA. */
typedef struct dso_states dso_states;
typedef struct dso_state_shape {
  int32_t heads, rows, cols;
} dso_state_shape;
DSO_API int64_t dso_states_slot_bytes(const dso_state_shape* shapes, int32_t n); /* of one slot */
DSO_API int32_t dso_states_create(const dso_state_shape* shapes, int32_t n, int64_t slots, dso_states** out);
DSO_API void dso_states_destroy(dso_states* s);
DSO_API int32_t dso_states_copy(dso_states* s, int32_t from, int32_t to);
DSO_API int32_t dso_states_release(dso_states* s, int32_t from_slot);            /* slots >= from_slot go back to the system */
DSO_API int32_t dso_states_save(const dso_states* s, int32_t slot, void* bytes); /* dso_states_slot_bytes bytes, to be */
DSO_API int32_t dso_states_load(dso_states* s, int32_t slot, const void* bytes); /* restored in any slot of these shapes */

/* ---- low-rank adapters (LoRA) ---------------------------------------------------------------------------
 * An adapter adds (x A^T) B^T to products of the model. A site is one product: `rows` outputs of `cols` inputs. A slot holds
 * one adapter: for each site A [rank, cols] and B [rows, rank], with any factor of the adapter already in B, or nothing. Both
 * are dso_weights in tiles of 16 rows, F32 as [ceil(rows/16)][cols][16], BF16 in pairs of columns, [ceil(rows/16)]
 * [ceil(cols/2)][16][2]; rows and columns past the end are zero. They are borrowed, as weights of plans are. A slot may be set
 * while plans run whose batches do not use it.
 * A site with several heads (keys and values of latent attention) is a product per head; A and B are each a stack of `heads`
 * matrices, or one that all heads share. Sequences whose adapter has matrices for such a site are never expanded.
 */
typedef struct dso_adapters dso_adapters;
typedef struct dso_adapter_site {
  int32_t rows, cols, heads; /* of a head; heads 0 or 1: one product */
} dso_adapter_site;
/* max_rank: of any adapter, at most that of the plan's LORA steps. */
DSO_API int32_t dso_adapters_create(const dso_adapter_site* sites, int32_t n, int32_t slots, int32_t max_rank,
                                    dso_adapters** out);
DSO_API void dso_adapters_destroy(dso_adapters* a);
DSO_API int32_t dso_adapters_set(dso_adapters* a, int32_t slot, int32_t site, const dso_weight* down,
                                 const dso_weight* up); /* A and B; both NULL: nothing */

/* ---- plan: a flat list of steps over slots ---------------------------------------------------------------
 * A slot is a buffer whose row count is set by each run: T tokens, or R logit rows for slots after SELECT_ROWS.
 * Slot kinds: F32 rows; BF16 rows (activations rounded to nearest even); Q8 rows: activations quantized in groups of 32 along
 * the row (width padded to 32): int8 q[wp], float scale[wp/32], int32 sum[wp/32] (sum of q), where scale = max|x|/127, q =
 * rint(x * (127/max|x|)); a group whose factor overflows (zeros, or max|x| below 1e-34) has scale 0 and q = 0; a group with a
 * NaN or infinity has scale NaN and q = 0 (the same for Q16).
 * Q16 rows, for formats whose own error is smaller than that of int8 activations (SmolLM2: int8 activations alone cost a KL
 * divergence of 0.003): int8 hi[wp], int8 lo[wp], float scale[wp/32], int32 sum[wp/32] (sum of q), where q = rint(x *
 * (32512/max|x|)), scale = max|x|/32512, hi = (q + 128) >> 8 in [-127, 127], lo = q - 256 hi in [-128, 127].
 * LOGITS is the caller's output buffer (F32 rows of vocab_size, always selected). */
enum { DSO_SLOT_F32 = 0, DSO_SLOT_BF16 = 1, DSO_SLOT_Q8 = 2, DSO_SLOT_Q16 = 3, DSO_SLOT_LOGITS = 4 };
/* selected: the rows are the logit rows. repeat: rows per token (0 or 1: one); row t * repeat + j is the j-th of token t. */
typedef struct dso_slot {
  int32_t kind, width, selected, repeat;
} dso_slot;

enum {
  /* in[], out[]: slots. w[], b[]: weights. -1 if absent. "any": F32, BF16, Q8 or Q16. */
  DSO_OP_EMBEDDING = 1,    /* w0[V,H] -> out0 F32, multiplied by scale; batch->inputs_embeds replaces the lookup, except with
                              the IDS flag */
  DSO_OP_RMS_NORM = 2,     /* in0 F32, w0 vector, eps -> out0 any. heads > 0: per head of head_dim (q/k norm), F32 */
  DSO_OP_ADD = 3,          /* in0, in1 F32 -> out0 F32 (may alias an input) */
  DSO_OP_ADD_RMS_NORM = 4, /* in0 residual, in1 delta, w0, eps -> out0 = in0 + in1 F32 (may alias in0), out1 = norm(out0) any */
  DSO_OP_CONVERT = 5,      /* in0 F32 -> out0 BF16, Q8 or Q16 */
  DSO_OP_LINEAR = 6,       /* in0, up to 3 matrices over one input (w0..2, b0..2) -> out0..2 F32.
                              in0 must be Q8 or Q16 for integer formats; BF16 for BF16 and FP8; F32 for F32.
                              in1..3, if set: results of LORA_DOWN for site `index` and those after it; adapters are added */
  DSO_OP_ROPE_TABLE = 7,   /* w0 = inverse frequencies vector [rot/2]; scale multiplies -> out0 F32 [T, rot]: cos | sin.
                              angle = fp32(position) * fp32(inv_freq) in fp32, then cos/sin rounded from double.
                              w1 vector [rot/2] (or -1): the axis of batch->axes whose position each frequency takes: 0, 1, 2 */
  DSO_OP_ROPE = 8,         /* in0 F32 [T, heads*head_dim], in1 table -> out0 F32 (may alias). INTERLEAVED flag: pairs
                              (2i, 2i+1). Elements [offset, offset + rot) of each head are rotated */
  DSO_OP_CACHE_WRITE = 9,  /* in0 key, in1 value (F32, kv_heads*head_dim), layer */
  DSO_OP_ROPE_CACHE = 10,  /* in0 q, in1 k, in2 v, in3 table -> out0 rotated q (may alias in0); rotated k and v are written to
                              the cache */
  DSO_OP_ATTENTION = 11,   /* in0 q F32 [T, heads*head_dim], layer, scale, window (0: none) -> out0 any. EAGER flag: score
                              matrix. sinks: with a window, the first `sinks` tokens stay visible as well. in1 (or -1), with top_k
                              > 0: F32 [T, kv_heads * top_k] from BLOCK_CHOOSE: for each kv head the only blocks that the row's q
                              heads attend to; window and sinks must then be 0. EAGER excludes both.
                              softcap c > 0: c * tanh(s / c) replaces a score s. w0 vector [heads] (or -1): a further logit
                              per head, in the denominator of its softmax only */
  DSO_OP_SWIGLU = 12,      /* in0 gate, in1 up F32 -> out0 any: silu(gate) * up */
  DSO_OP_GATE_UP = 13,     /* in0, w0 gate, w1 up (b0, b1) -> out0 any: silu(W0 x) * (W1 x); formats of w0 and w1 equal.
                              GELU flag: gelu instead of silu. in1, in2 as for LINEAR: added to gate and up */
  DSO_OP_SELECT_ROWS = 14, /* in0 F32 -> out0 F32, a selected slot: rows batch->logit_rows */
  DSO_OP_HIDDEN_OUT = 15,  /* in0 F32 -> batch->hidden + index * T * width, if requested; index = layer field.
                              LAST flag: also -> batch->last_hidden, if requested */

  /* Experts. routes: F32 [T, 2 * top_k]: the indices of the chosen experts, ascending, then their weights. */
  DSO_OP_ROUTE = 16, /* in0 F32 scores [T, experts] before softmax or sigmoid, b0 (or -1), w0 vector [experts] (or -1) -> out0
                        routes. Experts are chosen by score + b0 within the top_groups best of `groups` groups; weights are
                        scores * scale, and * w0 of the expert. Ties go to the lower index; NaN ranks highest, so that it
                        reaches the result */
  DSO_OP_EXPERTS_GATE_UP = 17, /* in0 any, in1 routes, w0 stack of 2 * experts (gate, up, gate, up ..) -> out0 any, repeat =
                                  top_k. GROUPED flag: rows of out0 are ordered by expert, as EXPERTS_DOWN with the same routes
                                  expects. GELU flag as in GATE_UP. b0 (or -1): vector [2 * experts * I], the biases of the
                                  matrices in turn. softcap > 0: h = (u + 1) * g * sigmoid(scale * g), where g = min(gate,
                                  softcap) and u is up limited to [-softcap, softcap]. groups > 0: routes name `groups`
                                  experts, of which the stack has those from `offset` on; the others are left out */
  DSO_OP_EXPERTS_DOWN = 18, /* in0 from EXPERTS_GATE_UP, in1 routes, w0 stack of experts -> out0 F32: sum over j, ascending, of
                               weight_j * (W x_j + b). GROUPED flag as in EXPERTS_GATE_UP. b0 (or -1): vector
                               [experts * rows], the biases of the matrices in turn. groups, offset as in EXPERTS_GATE_UP */

  /* Multi-head latent attention over a latent cache. Widths: q is heads * (nope + rope), a latent is rank + rope. */
  DSO_OP_LATENT = 19,       /* in0 F32 [T, rank + rope], in1 table, w0 vector [rank], eps -> out0 F32: norm of the first rank
                               elements, rotation of the others. INTERLEAVED flag */
  DSO_OP_LATENT_WRITE = 20, /* in0 F32 [T, rank + rope], layer */
  DSO_OP_MLA_ABSORB = 21, /* in0 q F32, w0 stack of heads [rank, nope] (F32 or BF16) -> out0 F32 [T, heads * (rank + rope)]: for
                             each head W q_nope, then q_rope unchanged; rows that MLA_ATTENTION will expand are not written */
  DSO_OP_MLA_ATTENTION = 22, /* in0 q, in1 output of MLA_ABSORB, in2 chosen tokens F32 (or -1), w0 kv_b [heads * (nope +
                                v_dim), rank] any format, layer, scale -> out0 F32 [T, heads * rank] weighted sums of latents
                                of absorbed rows, out1 F32 [T, heads * v_dim] of expanded ones. EXPAND flag: every row is
                                expanded; in1 and out0 are -1. top_k > 0: sparse. in2 [T, top_k] from INDEX_CHOOSE is read for
                                rows that see more than top_k tokens; the others see all. window, sinks: as in ATTENTION; not
                                together with top_k. The MLA_ABSORB and MLA_VALUE steps around it have the same top_k, window
                                and sinks */
  DSO_OP_MLA_VALUE = 23, /* in0 sums of latents, in1 out1 of MLA_ATTENTION (expanded rows), w0 stack of heads [v_dim, rank] ->
                            out0 any [T, heads * v_dim] */
  /* The lightning indexer. */
  DSO_OP_LAYER_NORM = 24,  /* in0 F32, w0 vector, b0 vector, eps -> out0 any */
  DSO_OP_INDEX_WRITE = 25, /* in0 F32 [T, index], layer */
  DSO_OP_INDEX_CHOOSE =
      26, /* in0 q F32 [T, heads * index], in1 F32 [T, heads], layer, top_k, scale -> out0 F32 [T, top_k]: the visible tokens
             with the largest scale * sum over h of w_h relu(q_h . k), ascending; ties go to the earlier token, and NaN counts
             as infinity. All tokens if there are no more than top_k; -1 after the last */
  /* MTP layers. */
  DSO_OP_STATE_IN = 27, /* batch->states -> out0 F32 */
  DSO_OP_CONCAT = 28,   /* in0, in1 F32 -> out0 any: the elements of in0, then those of in1 */
  /* Choosing which blocks a row attends to. Token i of its sequence (the first is 0) sees blocks [0, n) of 32 tokens, n = i /
     32 + 1. If n <= top_k, all of them are chosen. Otherwise blocks [0, S), S = ceil(sinks / 32), and [W, n), W = max(0, i + 1
     - window) / 32, are always chosen, and the middle blocks with the largest estimates fill up to top_k in all, ties going to
     the earlier block. S + ceil(window / 32) + 1 < top_k. The estimate (Tang et al. 2024, Quest) for q head h and block b is e
     = sum over d of max(q_d largest_d, q_d smallest_d), from the cache's summaries; for a group of heads it is the maximum of
     e_h - (largest e_h of the middle blocks). */
  DSO_OP_BLOCK_CHOOSE = 29, /* in0 q F32 [T, heads*head_dim], layer, heads, kv_heads, head_dim, top_k, window, sinks -> out0
                               F32 [T, kv_heads * top_k]: indices of blocks of the sequence, ascending, -1 after the last */
  DSO_OP_LATENT_CHOOSE =
      30, /* in0 output of MLA_ABSORB, layer, heads, top_k, window, sinks -> out0 F32 [T, 32 * top_k]: the tokens of the chosen
             blocks up to i, ascending, -1 after the last; all heads form one group. For in2 of MLA_ATTENTION */
  DSO_OP_GEGLU = 31,        /* in0 gate, in1 up F32 -> out0 any: gelu(gate) * up */
  DSO_OP_GELU = 32,         /* in0 F32 -> out0 any: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) */
  DSO_OP_SCALE = 33,        /* in0 F32 -> out0 any: scale * x */
  DSO_OP_SOFTCAP = 34,      /* in0 F32 -> out0 any: scale * tanh(x / scale) */
  DSO_OP_SIGMOID_GATE = 36, /* in0 F32, in1 F32 of the same width or of width 1 -> out0 any: in0 * sigmoid(in1) */
  DSO_OP_MULTIPLY = 37,     /* in0, in1 F32 -> out0 any: in0 * in1 */
  DSO_OP_COLUMNS = 38, /* in0 F32 -> out0 any: of each of `groups` equal parts of a row the elements from `offset` on, as many
                          as out0 has width / groups */
  /* Steps with a recurrent state, number `state` of the batch's dso_states. */
  DSO_OP_SHORT_CONV = 39, /* in0 F32 [T, N], w0 vector [window * N] (tap after tap), b0 vector [N] (or -1), window (taps), state
                             {1, window - 1, N} -> out0 F32: of each column, the sum of the sequence's last `window` rows times
                             the taps, the last row times the last tap, plus b0. SILU flag: silu of the sum */
  DSO_OP_DELTA_RULE = 40, /* in0 F32 [T, 2 * kv_heads * head_dim + heads * v_dim]: queries, keys, values; in1 a, in2 b F32
                             [T, heads]; w0 A_log, w1 dt_bias vectors [heads]; state {heads, head_dim, v_dim} -> out0 F32
                             [T, heads * v_dim]. The gated delta rule: with q and k of kv head h / (heads / kv_heads), divided
                             by sqrt(x.x + 1e-6), and q by sqrt(head_dim): S = d S, d = exp(-exp(A_log) log(1 + exp(a +
                             dt_bias))); S += k (sigmoid(b) (v - S^T k))^T; out = S^T q */
  DSO_OP_POSITION_SCALE = 41, /* in0 F32 -> out0 F32 (may alias): in0 * (1 + scale * log(1 + floor((position + offset) /
                                 window))) */
  /* Encoders. */
  DSO_OP_GELU_ERF = 42,          /* in0 F32 -> out0 any: x / 2 * (1 + erf(x / sqrt(2))) */
  DSO_OP_ENCODER_ATTENTION = 43, /* in0 q F32 [T, heads*head_dim], in1 k, in2 v F32 [T, kv_heads*head_dim], scale, window ->
                                    out0 F32 [T, heads*head_dim]: each row attends to all rows of its sequence in this step,
                                    or with a window to those at most `window` rows away on either side. Uses no cache; every
                                    context_len must be 0 */
  /* Adapters. Rows of sequences without an adapter, or whose adapter has nothing for the site, are not touched. */
  DSO_OP_LORA_DOWN = 44, /* in0 x of any kind [T, cols], index (the site) -> out0 [T, rank], BF16 if x is BF16 or Q8, else F32:
                            x A^T in the first elements of a row. For a site with heads: in0 F32 [T, heads*head_dim], of whose
                            heads the first `nope` elements are read, -> [T, heads*rank] */
  DSO_OP_LORA_UP = 45,   /* in0 F32 from LORA_DOWN, in1 y F32 [T, rows], index -> out0 = in1 (the same slot): y + in0 B^T. For a
                            site with heads: in1 [T, heads*head_dim], to whose heads' first `nope` elements it is added */
  DSO_OP_CLAMPED_SWIGLU = 46, /* in0 gate, in1 up F32 -> out0 any: silu(min(gate, scale)) * up limited to [-scale, scale] */
  DSO_OP_HASH_ROUTE = 47,     /* as ROUTE, for the experts in the token's row of w0, a vector [ids * top_k]: in0 F32
                                 [T, experts], scale -> out0 F32 [T, 2 * top_k] */
  /* Hyper-connections of n = groups streams, one after the other in a row. Weights are n that collapse the streams, and, if the
     row is (2 + n) n wide, n of the block's output and the mixing matrix [n][n]; graph/ops/streams.py has the formulas. */
  DSO_OP_STREAM_WEIGHTS = 48,  /* in0 F32, w0 vector (biases), w1 vector [1 or 3] (scales), top_k (normalizations), eps -> out0
                                  F32 (may alias) */
  DSO_OP_STREAM_COLLAPSE = 49, /* in0 F32 [T, n*H], in1 weights -> out0 F32 [T, H] */
  DSO_OP_STREAM_EXPAND = 50,   /* in0 F32 [T, n*H], in1 weights, in2 F32 [T, H] -> out0 F32 [T, n*H] */
  /* Compressed attention, over a cache of rows. A layer or `index` is a kind of rows, `groups` the tokens that share an entry.
     Token i of a sequence sees (i + 1) / groups entries. */
  DSO_OP_ROWS_WRITE = 51,     /* in0 F32, layer: a row per token */
  DSO_OP_COMPRESS = 52,       /* w0 vector (biases), w1 vector (of the norm), w2 vector [rot/2] (frequencies), layer (entries),
                                 index (what they are computed from), groups, offset, eps, scale (of cosines and sines): the
                                 entries of which the step has the last token; graph/ops/compressed.py has the formula. OVERLAP
                                 flag: also from the tokens of the entry before */
  DSO_OP_ENTRIES_CHOOSE = 53, /* as INDEX_CHOOSE, among the entries that a row sees: layer (their keys), groups, heads,
                                 head_dim, top_k, scale; in0 F32 [T, heads * head_dim], in1 F32 [T, heads] -> out0 F32 */
  DSO_OP_COMPRESSED_ATTENTION = 54, /* in0 q F32 [T, heads * head_dim], in1 chosen entries (or -1), w0 vector [heads]: a further
                                       logit per head, layer, index (entries; -1: none), groups, scale, window -> out0 F32: all
                                       heads attend to rows of head_dim elements, which are keys and values */
  DSO_OP_GROUPED_LINEAR = 55, /* in0 F32 [T, groups * cols], w0 matrix [groups * rows, cols] -> out0 F32 [T, groups * rows]: of
                                 each group of columns the product with its rows of the matrix. SHARED flag: w0 [rows, cols],
                                 the matrix of all groups */
  DSO_OP_ADD_FEATURES = 56,   /* in0 F32 -> out0 F32 (may alias): in0 + batch->features[index], index = layer field; in0 without
                                 features */
  DSO_OP_LINEAR_GELU = 57,    /* in0, w0 (b0) -> out0 any: GELU_ERF of W0 x, with the GELU flag GELU. in1 as for LINEAR */
  DSO_OP_RELU = 58,           /* in0 F32 -> out0 any: max(x, 0) */
  /* Patches of pictures. A row is at (i, j) = (batch->axes[1], batch->axes[2]) of a grid of grid_rows x grid_cols. */
  DSO_OP_GRID_QUERIES = 59, /* in0 F32 [T, heads*head_dim], w0 vector [head_dim][2 * grid_rows - 1], w1 vector [head_dim]
                               [2 * grid_cols - 1], scale -> out0 F32 [T, heads * width]: of each head scale * x, then x W0[:,
                               grid_rows - 1 - i + r] for each row r of the grid, x W1[:, grid_cols - 1 - j + c] for each
                               column c, zeros */
  DSO_OP_GRID_KEYS = 60,    /* in0 F32 [T, heads*head_dim] -> out0 F32 [T, heads * width]: of each head x, then 1 for row i and
                               0 for each other row of the grid, the same for its columns, zeros */
  DSO_OP_ZERO_PADDING = 61, /* in0 F32 -> out0 any: in0, or zeros where batch->axes[0] is not 0 */
  DSO_OP_CLAMP = 62,        /* in0 F32, w0 vector [1] low, w1 vector [1] high -> out0 any: min(max(in0, low), high) */
  DSO_OP_DRAFT_OUT = 63,    /* in0 F32 -> batch->draft_states, if requested. At most one in a plan */
  /* Of contexts with a group. PUBLISH is followed by SUM_PARTS or JOIN_PARTS, before any other PUBLISH. All processes of the
   * group run the same steps in the same order, over batches of the same sizes. */
  DSO_OP_PUBLISH = 64,    /* in0 F32: this process's part */
  DSO_OP_SUM_PARTS = 65,  /* out0 F32: the sum of all parts, in ascending order of ranks; their widths are those of out0 */
  DSO_OP_JOIN_PARTS = 66, /* out0 F32: the elements of all parts, in ascending order of ranks; `offset` elements in each part
                             but the last, which has the rest */
};
enum {
  DSO_FLAG_EAGER = 1,
  DSO_FLAG_INTERLEAVED = 2,
  DSO_FLAG_GROUPED = 4,
  DSO_FLAG_EXPAND = 8,
  DSO_FLAG_LAST = 16,
  DSO_FLAG_SIGMOID = 32,          /* ROUTE: scores are sigmoids instead of a softmax */
  DSO_FLAG_TOP2 = 64,             /* ROUTE: a group's score is the sum of its two best instead of its best */
  DSO_FLAG_NORMALIZE = 128,       /* ROUTE: weights are divided by their sum */
  DSO_FLAG_GELU = 256,            /* GATE_UP, EXPERTS_GATE_UP: the gate's activation is gelu, as in GEGLU, instead of silu;
                                     LINEAR_GELU: gelu instead of its exact form */
  DSO_FLAG_CHUNKED = 2048,        /* ATTENTION: the window is the chunk of `window` tokens that the row's own token lies in */
  DSO_FLAG_WEIGH_INPUT = 4096,    /* EXPERTS_GATE_UP: gate and up are multiplied by the expert's weight; EXPERTS_DOWN: the sum
                                     has no weights */
  DSO_FLAG_IDS = 8192,            /* EMBEDDING: rows are always looked up by batch->token_ids */
  DSO_FLAG_CHANNELS = 1024,       /* DELTA_RULE: in1 and w1 have head_dim elements per head, a decay for each row of a state */
  DSO_FLAG_SILU = 512,            /* SHORT_CONV: silu of the sum */
  DSO_FLAG_SQRT_SOFTPLUS = 16384, /* ROUTE, HASH_ROUTE: scores are sqrt(log(1 + e^x)) instead of a softmax */
  DSO_FLAG_PLAIN_UP = 32768,      /* EXPERTS_GATE_UP: with a limit, up instead of up + 1 */
  DSO_FLAG_OVERLAP = 65536,       /* COMPRESS: see there */
  DSO_FLAG_CAUSAL = 131072,       /* ATTENTION: rows attend to tokens up to their own only, whatever batch->visible_to says */
  DSO_FLAG_SHARED = 262144        /* GROUPED_LINEAR: see there */
};

typedef struct dso_step {
  int32_t op, flags;
  int32_t in[4], out[3], w[3], b[3];
  int32_t layer, heads, kv_heads, head_dim, window, sinks;
  int32_t offset;                         /* ROPE: first rotated element of a head; COLUMNS: first element of a part */
  int32_t nope, rope, rank, v_dim, index; /* latent attention; with adapters, index is the site */
  int32_t experts, top_k, groups, top_groups, state;
  float eps, scale;
  float softcap; /* ATTENTION: limit of the scores; EXPERTS_GATE_UP: of gate and up; 0: none */
  int32_t grid_rows, grid_cols;
} dso_step;

typedef struct dso_plan dso_plan;
DSO_API int32_t dso_plan_create(dso_context* c, const dso_step* steps, int32_t n_steps, const dso_slot* slots, int32_t n_slots,
                                const dso_weight* weights, int32_t n_weights, int32_t vocab_size, dso_plan** out);
DSO_API void dso_plan_destroy(dso_plan* p);
DSO_API int64_t dso_plan_buffer_bytes(const dso_plan* p, int32_t T,
                                      int32_t R);                    /* bytes of all slots for T tokens and R logit rows */
DSO_API int32_t dso_plan_reserve(dso_plan* p, int32_t T, int32_t R); /* allocates the buffers ahead of a run */

/* A ragged batch. Sequences in DECODE phase come first, then those in PREFILL; a sequence's rows are consecutive. Everything
 * is checked before anything is written: token ids against the vocabulary, block ids against the cache, lengths. */
enum { DSO_PHASE_DECODE = 0, DSO_PHASE_PREFILL = 1 };
typedef struct dso_batch {
  int32_t T, S, R, max_blocks;
  const int32_t* token_ids;   /* [T]; NULL only with inputs_embeds */
  const int32_t* positions;   /* [T]: for RoPE only; causality follows the order in the cache */
  const int32_t* query_len;   /* [S], sum T, each > 0 */
  const int32_t* context_len; /* [S]: tokens in the cache before this step */
  const int32_t* phase;       /* [S], ascending */
  const int32_t* block_table; /* [groups of the cache, S, max_blocks]: blocks for context_len + query_len tokens. -1 is allowed
                                 for a block that no row of this step sees, if every layer of its group has a window. The
                                 tables of groups that the plan does not use are not read */
  const int32_t* logit_rows;  /* [R], ascending */
  const float* inputs_embeds; /* [T, H] or NULL */
  const float* states;        /* [T, D]: input of STATE_IN; NULL for plans without it */
  float* logits;              /* [R, vocab_size] */
  float* hidden;              /* [n_hidden, T, H] or NULL */
  float* last_hidden;         /* [T, H]: only the last hidden state, after the final norm, or NULL */
  float* draft_states;        /* [T, D]: the input of DRAFT_OUT, or NULL, as it must be for plans without that step */
  dso_cache* cache;           /* NULL only for plans without attention */
  const float* inv_freq; /* [S, rot/2]: inverse frequencies per sequence, used by ROPE_TABLE instead of w0; NULL: w0 for all.
                            Only for plans with one ROPE_TABLE */
  /* Recurrent states, for plans that have them. */
  dso_states* recurrent;
  const int32_t* state_from; /* [S]: the slot with the states before the first row; -1, only if context_len is 0: zeros */
  const int32_t* state_to;   /* [n_state_to][2]: row and slot: the states after the row are stored in the slot. Rows ascend and
                                include every sequence's last. A slot occurs once; one in state_from may occur only with the
                                last row of the only sequence that it belongs to */
  int32_t n_state_to;
  /* Adapters, for plans with LORA steps. */
  const int32_t* adapter_of; /* [S]: slot of each sequence's adapter, -1: none; NULL: none for all. Faster if sequences of one
                                adapter follow each other */
  const dso_adapters* adapters; /* NULL only if adapter_of is */
  /* Pictures. */
  const int32_t* axes; /* [T][3]: positions in time, height and width, for ROPE_TABLE with w1; NULL: `positions` on each axis */
  const int32_t* visible_to; /* [T]: one past the last token of its sequence that a row attends to, not its own where the tokens
                                of a picture see each other; it lies within the step, and does not descend. NULL: its own.
                                Not with latent attention or chosen blocks */
  const float* features;     /* [n][T][width] for the plan's n ADD_FEATURES steps, or NULL: they copy their input */
} dso_batch;
/* The checks of dso_plan_run, without running: what it returns here it would return there, before anything is written. */
DSO_API int32_t dso_plan_check_batch(const dso_plan* p, const dso_batch* batch);
DSO_API int32_t dso_plan_run(dso_plan* p, const dso_batch* batch);
DSO_API int32_t dso_plan_check(const dso_plan* p); /* dso_mapping_check for all its weights */

/* ---- tokens chosen from logits --------------------------------------------------------------------------
 * How the tokens of one sequence are chosen. The definition is in Python; this library decides only where no rounding of that
 * computation can change the token (runtime/choice.cpp), and leaves all other steps to the caller.
 * First the penalties, in fp32: a logit of a token that occurs among the last `window` of `tokens` and of what was chosen since
 * (0: among all) is divided by `repetition`, or multiplied if it is negative; then `frequency` times the number of times that
 * the token occurs from tokens[n_prompt] on, plus `presence`, is subtracted if that is not 0. Then, with temperature 0, the
 * largest logit, the first if several are equal. Otherwise logits are divided by temperature, filtered and drawn from:
 *  - `numbers`, as backends/sampling.py does: step i draws by numbers[i];
 *  - `noise`, as Transformers' warpers and torch.multinomial do: step i chooses the largest probability divided by
 *    noise[i * noise_stride + token], an exponential variate;
 *  - neither: in the same way, with the variates that torch draws from a generator: that of a token is number
 *    first_variate + token of the step. */
typedef struct dso_mt19937 { /* the state of torch's generator on the CPU (at::mt19937) */
  int32_t left, next;
  uint32_t state[624];
} dso_mt19937;
typedef struct dso_choice {
  float temperature;
  int32_t top_k;                         /* 0: no filter */
  double top_p;                          /* 1: no filter */
  double min_p;                          /* 0: no filter */
  float repetition, frequency, presence; /* 1, 0, 0: no penalties; then tokens may be NULL */
  int32_t window, n_tokens, n_prompt;
  const int32_t* tokens;
  const double* numbers; /* [steps] in [0, 1), or NULL */
  const float* noise;    /* [steps][noise_stride], above 0, or NULL */
  int64_t noise_stride, first_variate;
  int32_t n_barred, barred_steps; /* in the first barred_steps steps, none of these tokens is chosen */
  const int32_t* barred;          /* [n_barred] */
} dso_choice;
enum { DSO_UNDECIDED = -1 };
/* The token that step `step` chooses from logits[vocab], or DSO_UNDECIDED. For tests. generator: its state before the step; may
 * be NULL. */
DSO_API int32_t dso_choose(dso_context* c, const float* logits, int32_t vocab, const dso_choice* choice, int32_t step,
                           const dso_mt19937* generator, int32_t* token);

/* Several decode steps, each with the tokens that the step before it chose. The batch is that of the first step: one row per
 * sequence, with its logits, in phase DECODE; its block table must have the blocks of all steps. Its logits are those of the
 * last step that was run; its last_hidden and draft_states, if not NULL, are [steps][S][H] and [steps][S][D] and receive those
 * of each step. Its states are those of the first step; each other step takes the draft states of the step before, or, in plans
 * without DRAFT_OUT, the last hidden states, which must not be NULL then. Plans with recurrent states and batches with inv_freq
 * for a changing length take one step a call. */
typedef struct dso_decode {
  int32_t steps; /* at most, > 0 */
  int32_t n_stops;
  const int32_t* stops;      /* [n_stops]: the step that chooses one of these tokens is the last */
  double seconds;            /* no step begins that would probably end later than this after the call */
  const dso_choice* choices; /* [S] */
  dso_mt19937* generator;    /* its state before the call, and then after the steps whose tokens were chosen; or NULL */
  int64_t variates;          /* that a step draws from it */
  int32_t* tokens;           /* [steps][S]: receives the chosen tokens */
  int32_t done;              /* receives the number of steps whose tokens were all chosen */
  int32_t undecided;         /* receives 1 if one more step was run, whose tokens the caller must choose */
  const int32_t* token_of;   /* [vocab_size]: the token of each logit, without penalties; NULL: its own number */
  int32_t keep_logits;       /* 1: the batch's logits are [steps][S][vocab_size] and receive those of each step */
  int32_t reserved;          /* 0 */
} dso_decode;
DSO_API int32_t dso_plan_decode(dso_plan* p, const dso_batch* batch, dso_decode* d);

/* The same for a model whose layers are divided among processes (a pipeline). The first process has the first layers and what
 * follows the last one, `tail`, whose states are the hidden rows. In each step it runs its layers, and sends the rows through
 * each link in turn and receives them back; then it runs `tail` and chooses the tokens. Meanwhile each of the others is in
 * dso_plan_follow, which returns when this call does, even if this one fails, except where it refuses a NULL or the links. The
 * batch of layers is that of the first step, of the same sequences, with R 0, in phase DECODE; its last_hidden, [S][H],
 * receives the rows after them. DSO_ELOST: a process has ended, or has sent something else, which is then the next message on
 * its link. */
typedef struct dso_stages {
  dso_plan* first;        /* of the first layers */
  const dso_batch* batch; /* of these; its states are NULL, as those of the other batches */
  const int32_t* links;   /* [n_links]: connected stream sockets to the other processes, in the order of their layers */
  int32_t n_links;        /* > 0 */
  int32_t lost;           /* receives the index of the link that failed, or -1 */
} dso_stages;
DSO_API int32_t dso_plan_decode_stages(dso_plan* tail, const dso_batch* batch, dso_decode* d, dso_stages* stages);
DSO_API int32_t dso_plan_follow(dso_plan* p, const dso_batch* batch, int32_t link);

/* Several rounds of decoding with drafts, of one sequence. In a round, the drafting plan runs over its pending rows, whose
 * states are the model's, and once more for each further draft, over its own draft state: a draft is its most likely
 * token. Then the model runs over its last token and the drafts, and tokens are chosen row by row, as in dso_plan_decode, up to
 * the first that is not the draft. The rows of these tokens are the drafting plan's next pending ones.
 *   batch: the first step of the model without drafts: one row in phase DECODE. Its logits are [1 + drafts][vocab_size], its
 *     draft_states [1 + drafts][D], or, without DRAFT_OUT, last_hidden [1 + drafts][H]; both receive those of the last round.
 *   pending: the drafting plan's first step, with logits of its last row, in phase DECODE: T rows, the last of which is the
 *     one before the model's. Its draft_states (last_hidden) are [max(T, 1 + drafts)][D].
 * Both block tables have the blocks of `room` tokens after the model's context_len. */
typedef struct dso_drafted_decode {
  int32_t rounds; /* at most, > 0 */
  int32_t drafts; /* in a round at most, > 0 */
  int32_t room;   /* tokens at most, > 1; no round begins when only one is left */
  int32_t n_stops;
  const int32_t* stops;     /* [n_stops]: the round that chooses one of these tokens ends with it, and is the last */
  double seconds;           /* no round begins that would probably end later than this after the call */
  float least;              /* a draft whose probability is below this is the last of its round */
  int32_t reserved;         /* 0 */
  const dso_choice* choice; /* of the call's i-th token: step i; without noise and variates */
  const int32_t* token_of;  /* [vocab_size of the drafting plan]: the token of each logit; NULL: its own number */
  int32_t* tokens;          /* [rounds * (1 + drafts)]: receives the chosen tokens */
  int32_t* drafted;         /* [rounds]: receives the number of drafts of each round */
  int32_t* chosen;          /* [rounds]: and of chosen tokens, the accepted drafts and one more */
  double* took;             /* [rounds]: and of seconds */
  int32_t done;             /* receives the number of rounds */
  int32_t undecided;        /* receives 1 if one more token of the last round is to be chosen, from the row of logits after its
                               chosen ones, which are then accepted drafts only */
} dso_drafted_decode;
DSO_API int32_t dso_plan_decode_drafted(dso_plan* p, const dso_batch* batch, dso_plan* drafter, const dso_batch* pending,
                                        dso_drafted_decode* d);

/* What the last run did. handovers: stages of steps that the threads shared, each of which one thread handed over to all.
 * sleeps: how often a thread that waited for the next stage went to sleep. With several memory nodes, the pages of weights that
 * the first run found on their node, moved there, or had to leave elsewhere, and those of mapped files that it copied. */
typedef struct dso_run_counts {
  int64_t handovers, sleeps, pages_there, pages_moved, pages_left, pages_copied;
} dso_run_counts;
DSO_API int32_t dso_plan_counts(const dso_plan* p, dso_run_counts* out);

/* With timing on, the seconds spent in each step are summed over runs (wall time on thread 0), and runs are counted. */
DSO_API int32_t dso_plan_set_timing(dso_plan* p, int32_t on);
DSO_API int32_t dso_plan_timing(const dso_plan* p, double* seconds_per_step, int64_t* runs);
#ifdef __cplusplus
}
#endif
#endif
