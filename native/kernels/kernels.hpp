// The interface between kernels and runtime: one table of plain functions per ISA variant, filled in by kernels/<isa>/*.cpp
// from the algorithms in kernels/generic. The runtime deals with threads, slots and steps; a kernel deals with lanes and tiles.
// Every function works on a range given by the caller and touches no global state, so that the runtime alone decides how work
// is split. `stride` is in BYTES throughout.
//
// This header is included by ISA translation units: plain types only, no inline functions, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dso {

struct TrainProduct;      // train_product.hpp
struct TrainElementwise;  // train_elementwise.hpp
struct TrainAttention;    // train_attention.hpp

struct Fetch {  // memory that will be read soon
  const uint8_t* data;
  int64_t bytes;
};

struct Matrix {  // a packed weight, see dso.h
  int32_t format;
  int32_t rows, cols;
  const uint8_t* data;
  // What is read after the product. Products of many integer rows, which leave memory idle, fetch it meanwhile; not those in
  // AMX tiles, and not those of int3 weights.
  const Fetch *next = nullptr, *next_end = nullptr;
};

struct LowRank {  // a matrix of an adapter, F32 or BF16, in tiles of 16 rows, see dso.h
  int32_t format;
  int32_t rows, cols;
  const uint8_t* data;
  int64_t tile_bytes;
  const uint8_t* next = nullptr;  // a matrix of this size that will be read next, to be fetched meanwhile
};

struct KvLayout {  // one layer of a cache; the layout inside a block is private to the kernels
  int32_t type;    // DSO_KV_*
  int32_t kv_heads, head_dim;
  int64_t layer_bytes;  // bytes of one layer within a block; a multiple of 64
  // A latent cache has these instead of heads: 32 rows of `rank` and `rope` elements, token after token, then 32 rows of
  // `index` elements of the indexer's keys. See latent_row_bytes and index_row_bytes in runtime/layout.hpp.
  int32_t rank = 0, rope = 0, index = 0;
  int64_t row_bytes = 0, index_bytes = 0;  // per row
  // Bytes of the summaries of 32 blocks and one kv head (latent: of all elements of a row), see kernels/generic/summaries.hpp;
  // 0: none.
  int64_t summary_bytes = 0;
  // A kind of rows has `rank` elements, like a latent, and this many tokens share a row; 0: not a cache of rows.
  int32_t every = 0;
};

// One layer of the cache for one sequence: token t is in block table[t / 32], slot t % 32.
struct KvView {
  uint8_t* base;         // start of block 0 of this layer
  int64_t block_stride;  // bytes from one block to the next
  const int32_t* table;
  uint8_t* summaries = nullptr;  // of blocks 0 to 31 of this layer, one kv head after the other
  int64_t summary_stride = 0;    // bytes to the summaries of the next 32 blocks
};

struct VisibleTokens {              // the tokens that a row attends to: those up to itself,
  int64_t window = 0, sinks = 0;    // the last `window` and the first `sinks`; window 0: all
  const int32_t* chosen = nullptr;  // or only those in these blocks of the sequence: `blocks` indices, ascending
  int64_t blocks = 0;
  bool chunked = false;  // the window is the chunk of `window` tokens that the row's own token lies in; without sinks
  // If the newest tokens are read from a copy (CacheCopy): the last `newest` tokens of those are not seen, or, if `copied`,
  // only they are, as far as the window reaches.
  int64_t newest = 0;
  bool copied = false;
  const int32_t* ends = nullptr;  // [rows]: one past the last token that a row attends to; null: its own

  // First token of the window of the row that is token i of its sequence; may be negative.
  int64_t begin(int64_t i) const { return chunked ? i - i % window : i + 1 - window; }
  // One past the last token of row r, which is token ctx + r; it ascends with r.
  int64_t end(int64_t ctx, int64_t r) const { return ends ? ends[r] : ctx + r + 1; }
};

struct Scores {                  // of attention: s = scale * q k
  float scale;                   // of either sign
  float softcap = 0;             // c: c * tanh(s / c) replaces s; 0: none
  const float* sinks = nullptr;  // per q head concerned, a further logit in the softmax's denominator only; null: none
};

// A second copy of a layer, in INT8, from which a row reads the last `tokens` tokens.
struct CacheCopy {
  const KvLayout& layout;
  KvView view;
  int64_t tokens;
};

struct Rotation {      // of the keys of a block: elements [offset, offset + rot) of each, in pairs as in `rope`
  const float* table;  // cosines and sines of 32 tokens, in the kernel's order
  int64_t rot, offset;
  bool interleaved;
};

struct MlaHead {              // for expanded latent attention
  int64_t nope, rope, v_dim;  // nope + rope and v_dim are at most max_head_dim
  bool single;                // all in fp32; otherwise keys and values (and q and weights if the ISA has bf16) are bf16
};

struct ElementwiseOp {  // out[i] = f(a[i]) or f(a[i], b[i]); some have a parameter, `scale`
  int32_t op;           // DSO_OP_*
  const char* name;     // for error messages
  int32_t inputs;       // 1 or 2
  // One row of n elements. b is null for ops with one input; out may alias a or b.
  void (*row)(const float* a, const float* b, int64_t n, float scale, float* out);
};

struct LinearKernels {
  // ---- linear: y[t, n] for tokens [0, T) and row tiles [tile_begin, tile_end) (16 outputs each; outputs past `rows` are not
  // written). x rows are of `kind`. `prefill` selects the family (both may be the same code). scratch: private to the caller's
  // thread, linear_scratch bytes, 64-aligned. y may be strided; bias may be null.
  void (*linear)(const Matrix& w, const float* bias, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T, bool prefill,
                 int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch);
  size_t linear_scratch;
};

struct AttentionKernels {
  // Below, q and o point at row 0 of the sequence and at the first q head concerned: row r is r strides further. Unwritten
  // slots at the end of a block may hold NaN; a NaN in tokens that a row does not see never reaches its result.
  // Decode family: partial attention of query rows [r0, r1) of one sequence (`group` q heads of ONE kv head) over
  // chunk number `chunk` of attn_chunk tokens, counted from the start of the sequence; or over the same number of chosen
  // blocks, starting at chosen block chunk * attn_chunk / 32, and then r1 must be r0 + 1. Row r is token ctx + r. Blocks that
  // no row sees are not touched. For every (row, q head), writes m, l and o[head_dim] to part + ((r - r0) * group + h) *
  // (head_dim + 16) floats: part[0] = m, part[1] = l, o at +16. Rows that see nothing of the chunk get m = -inf, l = 0, o = 0.
  // Sinks are left to the merge.
  void (*attn_decode_chunk)(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride,
                            int64_t group, int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight,
                            const Scores& scores, int64_t chunk, float* part, uint8_t* scratch);
  // Merges chunks [c0, c1) of ONE (row, q head) in ascending order; partials are `part_stride` floats apart. sink: as in
  // Scores, of this head; null: none.
  void (*attn_merge)(const float* part, int64_t part_stride, int64_t chunks, int64_t head_dim, const float* sink, float* out);
  // The same, but returns a partial result as for one chunk that covers all of them, for a later merge. A single part is
  // copied.
  void (*attn_fold)(const float* part, int64_t part_stride, int64_t chunks, int64_t head_dim, float* out);
  // Prefill family: rows [r0, r1) of one sequence, all q heads of one kv head, online softmax over blocks of 32 in ascending
  // order; a row's result depends, bit for bit, only on its own q and the cache up to it. o: [rows, heads*head_dim] at the
  // first q head. copy: of the newest tokens, which follow the others; null: none.
  void (*attn_prefill)(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride, int64_t group,
                       int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight, const Scores& scores,
                       const CacheCopy* copy, float* o, int64_t o_stride, uint8_t* scratch);
  // Eager form: the whole score row of one (row, q head), softmax, weighted sum. row: scratch for ctx + r + 1 floats.
  void (*attn_eager)(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t n, int64_t first,
                     const Scores& scores, const CacheCopy* copy, float* row, float* o);  // sees tokens [first, n)
  size_t attn_scratch;  // bytes, private to the caller's thread

  // Expanded attention, one chunk of attn_chunk tokens and one head at a time: mla_rows converts latents to rows that a matrix
  // product reads, the product computes keys and values, mla_panels stores these as panels, and mla_expanded runs rows of q
  // over the panels. mla_rows: latents of tokens [first, first + n) as rows of a slot kind; room: rank floats.
  void (*mla_rows)(const KvLayout& l, const KvView& v, int64_t first, int64_t n, int32_t kind, float* room, uint8_t* rows,
                   int64_t stride);
  int64_t (*mla_panel_bytes)(const MlaHead& head);  // per chunk
  // Stores keys and values of tokens [first, first + n), in rows of `nope` and v_dim elements, in the panels of their chunk.
  // Tokens are given in order, in whole blocks except for the last.
  void (*mla_panels)(const KvLayout& l, const KvView& v, const MlaHead& head, int64_t first, int64_t n, const float* kv,
                     int64_t stride, uint8_t* panels);
  // Rows [r0, r1) of a sequence over the chunk, whose panels exist for every block that a row sees. q, o and the state (m, l of
  // row r at [r - r0]) as in attn_prefill: the caller sets m to -inf, and l and o to 0, before a row's first chunk, and divides
  // o by l after its last. scratch: attn_scratch bytes.
  void (*mla_expanded)(const MlaHead& head, const uint8_t* panels, int64_t chunk, const float* q, int64_t q_stride, int64_t r0,
                       int64_t r1, int64_t ctx, const VisibleTokens& sight, float scale, float* m, float* sum, float* o,
                       int64_t o_stride, uint8_t* scratch);
};

struct LatentKernels {  // queries over the rows of a latent cache
  // Absorbed attention: up to mla_heads heads of one query row over up to attn_chunk tokens. `scratch`: private to the caller's
  // thread, mla_scratch() bytes, 64-aligned; mla_tokens loads the tokens into it, and any number of mla_attend calls read them.
  int64_t (*mla_scratch)(const KvLayout& l);
  int64_t (*mla_query_bytes)(const KvLayout& l);  // of one packed query, a multiple of 64
  void (*mla_query)(const KvLayout& l, const float* q, int64_t heads, float scale, uint8_t* packed);  // q: [heads, rank + rope]
  // Tokens chosen[0 .. n) of the sequence; if `chosen` is null, [first, first + n), of one chunk of attn_chunk counted from the
  // start of the sequence. All must have been written.
  void (*mla_tokens)(const KvLayout& l, const KvView& v, const int32_t* chosen, int64_t first, int64_t n, uint8_t* scratch);
  // The query sees tokens [begin, end) of these (none if begin >= end) and is unaffected by the others, also by how many of
  // them are before its first and after its last. For every head, writes
  // the same as attn_decode_chunk, where o has `rank` elements: the weighted sum of the latents.
  void (*mla_attend)(const KvLayout& l, const uint8_t* packed, int64_t heads, int64_t begin, int64_t end, float* part,
                     uint8_t* scratch);

  // The lightning indexer, over index keys. Reorders one row of q [heads, index] as index_scores reads it:
  // index_query_bytes(heads, index) bytes, 64-aligned.
  void (*index_query)(const KvLayout& l, int64_t heads, const float* q, uint8_t* packed);
  int64_t (*index_query_bytes)(int64_t heads, int64_t index);
  // scores[t - begin] = scale * sum over h of w_h relu(q_h . k_t), for tokens [begin, end); NaN counts as infinity.
  void (*index_scores)(const KvLayout& l, const KvView& v, int64_t heads, const uint8_t* q, const float* w, int64_t begin,
                       int64_t end, float scale, float* scores);
};

struct RowKernels {  // everything else: rows of activations, weights and caches
  // ---- the element-wise ops of plans, one row each
  const ElementwiseOp* elementwise_ops;
  int64_t elementwise_count;

  // ---- activations: columns [begin, end) of an f32 row (x points at column `begin`) to the same columns of a slot row (BF16,
  // Q8, Q16) of `width` columns; begin is a multiple of 32, and the group that contains column width - 1 is zero-filled.
  void (*convert)(int32_t kind, const float* x, int64_t begin, int64_t end, int64_t width, void* row);
  // The numbers that a whole row of kind Q8 or Q16 stands for: Q8 as a row of BF16, Q16 as one of F32. out has room for a
  // multiple of 32.
  void (*restore)(int32_t kind, const void* row, int64_t width, void* out);

  void (*embed_row)(const Matrix& w, int32_t row, float scale, float* out);
  void (*unpack_rows)(const Matrix& w, int64_t begin, int64_t end, float* out, int64_t stride);
  // Packs one tile row (FP8: the band of 8 tile rows, which share scales, with index `tile`); src is the whole matrix, dst the
  // whole packed matrix. importance: per column, for INT4 and Q4_1; may be null.
  void (*pack_tile)(int32_t format, int32_t src_type, const void* src, int64_t rows, int64_t cols, int64_t stride,
                    const float* importance, int64_t tile, uint8_t* dst);

  // ---- parts of other ops, one row each
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out);
  void (*add)(const float* a, const float* b, int64_t n, float* out);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  void (*geglu)(const float* gate, const float* up, int64_t n, float* out);
  // (u + raise) * g * sigmoid(alpha * g), with g = min(gate, limit) and u = up within [-limit, limit]
  void (*clamped_swiglu)(const float* gate, const float* up, int64_t n, float alpha, float limit, float raise, float* out);
  void (*softmax)(const float* x, int64_t n, float* out);
  void (*sigmoid)(const float* x, int64_t n, float* out);
  void (*add_scaled)(const float* x, float scale, int64_t n, float* y);  // y = fma(x, scale, y)
  void (*scale)(const float* x, float factor, int64_t n, float* out);    // out may alias x
  // out = x * sigmoid(gate), where gate has n elements or one for all. out may alias x.
  void (*sigmoid_gate)(const float* x, const float* gate, bool one, int64_t n, float* out);
  void (*clamp)(const float* x, float low, float high, int64_t n, float* out);  // out may alias x
  // out[i] = sum over d of x[d] * table[d * stride + i], for i in [0, n)
  void (*vector_product)(const float* x, int64_t width, const float* table, int64_t stride, int64_t n, float* out);
  void (*rope)(const float* x, const float* table, int64_t heads, int64_t head_dim, int64_t offset, int64_t rot,
               bool interleaved, float* out);

  // ---- recurrent states, state_cols columns at a time (`cols` of them are used). Rows [0, n) of one sequence, whose state
  // before them becomes the one after them. Columns of a convolution. weight: tap after tap, weight_stride apart; bias may be
  // null. state: [taps - 1][state_cols].
  void (*short_conv)(const float* x, int64_t x_stride, int64_t n, int64_t cols, const float* weight, int64_t weight_stride,
                     const float* bias, int64_t taps, bool silu, float* state, float* y, int64_t y_stride);
  // x / sqrt(x.x + 1e-6) * scale
  void (*unit_length)(const float* x, int64_t n, float scale, float* out);
  // Columns of the delta rule. q, k: [n][k_dim], dense; rate: a number per row; decay: a number per row, or with `channels`
  // [n][k_dim]. state: [k_dim][state_cols].
  void (*delta_rule)(const float* q, const float* k, const float* v, int64_t v_stride, int64_t n, int64_t k_dim, int64_t cols,
                     const float* decay, const float* rate, bool channels, float* state, float* o, int64_t o_stride);

  // ---- adapters: x W^T of rows [0, T) of kind F32 or BF16 for outputs of tiles [tile_begin, tile_end) (16 outputs each;
  // outputs past `rows` are not written), stored in y, or added to it. Each output depends on its own row only, bit for bit.
  void (*low_rank)(const LowRank& w, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T, int64_t tile_begin,
                   int64_t tile_end, bool accumulate, float* y, int64_t y_stride);

  // ---- cache and attention
  int64_t (*kv_layer_bytes)(int32_t type, int64_t kv_heads, int64_t head_dim);
  // Writes `n` tokens (k, v: [n, kv_heads*head_dim], strided) at positions [start, start + n) for kv heads [h0, h1).
  void (*kv_write)(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* k, int64_t k_stride,
                   const float* val, int64_t v_stride, int64_t h0, int64_t h1);
  void (*kv_read)(const KvLayout& l, const KvView& v, int64_t tokens, float* key,
                  float* value);  // [kv_heads, tokens, head_dim]

  void (*kv_rotate)(const KvLayout& l, const KvView& v, int64_t block,
                    const Rotation& turn);  // table: [rot][32 tokens], cosines first

  // ---- block choice by summaries
  void (*kv_summarize)(const KvLayout& l, const KvView& v, int64_t block);      // of a full block, all heads
  void (*latent_summarize)(const KvLayout& l, const KvView& v, int64_t block);  // rank + rope is at most max_summary_width
  // Estimates for `n` panels of summary_blocks blocks of the cache, for rows [r0, r1) and all q heads of one kv head (q as
  // above; for a latent cache, whose rows are keys of one kv head, absorbed): the estimate for head h of row r and column c of
  // panels[i] is written to estimates[((r - r0) * group + h) * stride + i * summary_blocks + c]. scratch: attn_scratch bytes.
  // Columns of blocks that are not full are undefined.
  void (*block_estimates)(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride, int64_t group,
                          int64_t r0, int64_t r1, const int32_t* panels, int64_t n, float* estimates, int64_t stride,
                          uint8_t* scratch);
  // scores[j] = the maximum over h of estimates[h * stride + j] - (the maximum of head h's n estimates); NaN counts as
  // infinity.
  void (*block_scores)(const float* estimates, int64_t stride, int64_t group, int64_t n, float* scores);

  // ---- the lightning indexer, over the index keys of a latent cache
  void (*index_write)(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* k,
                      int64_t k_stride);  // as kv_write
  // Indices of the k largest of n scores, 0 < k < n, ascending, as floats; ties go to the first. No score may be NaN.
  void (*index_select)(const float* scores, int64_t n, int64_t k, float* chosen);

  // ---- latent caches
  void (*latent_write)(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* x, int64_t stride);
  void (*latent_read)(const KvLayout& l, const KvView& v, int64_t tokens, float* latent, float* index);  // index may be null
  // Tables: [32 tokens][rot], cosines first in each. index: for the indexer's keys, null if there are none. room: floats for
  // a row's rope elements, and for the rot of `index`.
  void (*latent_rotate)(const KvLayout& l, const KvView& v, int64_t block, const Rotation& key, const Rotation* index,
                        float* room);

  // ---- compressed attention: entry number `entry` before its norm, `width` elements, from the rows of its `every` tokens, and
  // with `overlap` of the tokens before these, in a cache of rows in fp32 or bf16. graph/ops/compressed.py has the formula.
  void (*compress_entry)(const KvLayout& l, const KvView& v, int64_t entry, int64_t every, bool overlap, const float* bias,
                         int64_t width, float* out);

  // ---- the choice of a token from a row of logits (kernels/generic/choice.hpp)
  int64_t (*first_largest)(const float* x, int64_t n);  // its index; -1 if it is not finite or any element is NaN
  float (*smallest)(const float* x, int64_t n);         // NaN if any element is
  void (*divide)(const float* x, float divisor, int64_t n, float* out);
  void (*quotients)(const float* a, const float* b, int64_t n, float* out);
  void (*exp_differences)(const float* x, float top, int64_t n, float* out);  // e^(x - top)
  // maxima[c]: the largest of x[c], x[c + columns], ..., `rows` elements.
  void (*column_maxima)(const float* x, int64_t rows, int64_t columns, float* maxima);
  int64_t (*at_least_indices)(const float* x, float bound, int64_t n, int32_t* indices);  // ascending; returns their number
};

// The kernels of one variant. Each part has its own translation units; a variant may share parts with another
// (runtime/variants.cpp).
struct Kernels : LinearKernels, AttentionKernels, LatentKernels, RowKernels {
  const char* isa;

  const TrainProduct* train_product;
  const TrainElementwise* train_elementwise;
  const TrainAttention* train_attention;
};

constexpr int64_t attn_chunk = 256;     // chunk size of the decode family; chunks are counted from the start of the sequence
constexpr int64_t attn_rows = 32;       // query rows per prefill task
constexpr int64_t summary_blocks = 32;  // blocks whose summaries share a panel: rows of 32 times 4 bytes, one column per block
constexpr int64_t mla_heads = 16;       // heads of a packed query
constexpr int64_t state_cols = 16;      // columns of a recurrent state that are stored together
constexpr int64_t latent_group = 128;   // elements of an int8 or int4 latent that share a scale
constexpr int64_t max_head_dim = 512;   // head_dim is also even: cache and attention take columns in pairs
constexpr int64_t max_summary_width = 3840;  // maximum number of elements of a key that estimates are computed from

// One per variant of the processor; null if the compiler could not build it.
const Kernels* kernels_avx2();
const Kernels* kernels_avx2_vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_amx_emulated();
const Kernels* kernels_neon();
const Kernels* kernels_neon_dotprod();
const Kernels* kernels_neon_i8mm();

}  // namespace dso
