// The core of attention, shared by its families: a tile of query rows against a chunk of the cache.
//
// A row's state is (m, l, o): the largest logit so far, the sum of weights 2^(logit - m), and the weighted sum of values.
// Logits are in units of log 2: q is multiplied by scale * log2(e) when it is copied into the tile, so softmax needs only 2^x.
// Both products, q K^T and p V, are one small kernel over panels of 32 columns (attention_product.hpp); every output is one
// chain of additions over ascending rows of the panel, so a row's bits do not depend on which rows share its tile.
//
// A row sees the tokens of its Span. Hidden tokens within a tile's blocks get the logit -inf and thus the weight 0, which
// changes neither sums nor bits. Slots that no row of the call sees may hold anything, including NaN: see visible_block; blocks
// that no row sees are not touched, and may be missing from the table.
#pragma once
#include "attention_product.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// ---- blocks ----------------------------------------------------------------------------------------------------------

struct Span {  // tokens [begin, end) and [0, sinks); sinks < begin, or 0
  int64_t begin, end, sinks = 0;

  bool has(int64_t token) const { return token < end && (token >= begin || token < sinks); }
  bool touches(int64_t block) const {
    const int64_t token = block * block_tokens;
    return token < end && (token + block_tokens > begin || token < sinks);
  }
  bool fills(int64_t block) const {
    const int64_t token = block * block_tokens, last = token + block_tokens;
    return last <= end && (token >= begin || last <= sinks);
  }
};

// The tokens that query row r sees; the first and last of several rows determine what all of them see together.
DSO_INLINE Span visible(int64_t ctx, const VisibleTokens& sight, int64_t r) {
  int64_t begin = sight.window > 0 ? sight.begin(ctx + r) : 0, end = sight.end(ctx, r);
  if (sight.newest > 0) {
    const int64_t copied = end - sight.newest, first = copied > begin ? copied : begin;
    if (sight.copied) return {first > 0 ? first : 0, end};
    end = first > 0 ? first : 0;
  }
  if (begin <= sight.sinks) return {0, end};
  return {begin, end, sight.sinks};
}
DSO_INLINE Span together(const Span& first, const Span& last) { return {first.begin, last.end, first.sinks}; }

struct Block {  // one kv head of one block, ready to read
  const uint8_t *k, *v;
  const float *k_scale, *v_scale;  // INT8 and INT4 only
  int64_t token;                   // its first token
};

constexpr int64_t block_room_bytes = block_tokens * max_head_dim * 4;  // maximum bytes that visible_block needs: V in fp32

// Copies a V panel of the block whose first token is `token`, with zeros for hidden tokens.
template <Read T>
static void copy_seen(const uint8_t* panel, int64_t token, const Span& seen, uint8_t* out) {
  for (int64_t row = 0; row < block_tokens / row_depth<T>; ++row) {
    const int64_t t = token + row * row_depth<T>;
    const uint32_t mask = (seen.has(t) ? 0xffffu : 0) | (seen.has(t + row_depth<T> - 1) ? 0xffff0000u : 0);
    for (int64_t c = 0; c < 32; ++c) ((uint32_t*)out)[row * 32 + c] = ((const uint32_t*)panel)[row * 32 + c] & mask;
  }
}

// Prepares block `block` of a kv head for reading by T, if tokens of `seen` are needed. Values and scales that a weight of 0
// could turn into NaN are replaced by zeros in `room`, a copy: reading never changes the cache itself.
template <Read T>
static Block visible_block(const KvLayout& l, const KvView& view, int64_t kv_head, int64_t block, const Span& seen,
                           uint8_t* room) {
  const HeadLayout h = head_layout(l.type, l.head_dim);
  const uint8_t* head = kv_head_block(view, h, kv_head, block);
  const int64_t panels = round_up(l.head_dim, 32) / 32;
  Block b = {head, head + h.v, nullptr, nullptr, block * block_tokens};
  if (has_scales(l.type)) {
    b.k_scale = (const float*)(head + h.k_scale);
    b.v_scale = (const float*)(head + h.v_scale);
    if (!seen.fills(block)) {
      float* scale = (float*)room;
      for (int64_t i = 0; i < block_tokens; ++i) scale[i] = seen.has(b.token + i) ? b.v_scale[i] : 0.0f;
      b.v_scale = scale;
    }
  } else if (!seen.fills(block)) {
    if constexpr (column_bytes<T> == 4) {
      for (int64_t p = 0; p < panels; ++p) copy_seen<T>(b.v + p * h.panel, b.token, seen, room + p * h.panel);
      b.v = room;
    }
  }
  return b;
}

// Column k of a tile's rows, in the form that product reads.
template <Read T>
DSO_INLINE const void* tile_column(const void* a, int64_t k) {
  return (const char*)a + k * (narrow<T> ? 2 : 4);
}

// ---- a tile of rows against a chunk ------------------------------------------------------------------------------------

struct Workspace {                         // private to a thread; rows of row_stride elements
  alignas(64) float s[8 * row_stride];     // logits, then weights if these are fp32
  alignas(64) float q[8 * row_stride];     // fp32, or bf16 in the first half
  alignas(64) uint16_t p[8 * row_stride];  // weights in bf16
  alignas(64) uint8_t room[chunk_blocks][block_room_bytes];
};

struct State {  // for R consecutive rows
  float *m, *l;
  float* o[8];
};

// Up to chunk_blocks blocks in the form that a tile reads. A piece is 32 rows of a panel: K block by block, then V panel by
// panel, block by block. ahead[i] is the distance from piece i to the one to prefetch at that time.
constexpr int64_t max_pieces = 2 * chunk_blocks * max_head_dim / 32;

struct Stretch {
  const Block* blocks;
  int64_t count;
  int64_t k_pieces, v_panels,
      panel_bytes;  // K's pieces of a block, the last of which may be short, are as long as a panel of V
  const int64_t* ahead;
  float softcap = 0;  // in units of log 2

  void look_ahead(const uint8_t* next, int64_t* out) const {  // next: the following K panel, or null
    const uint8_t* piece[max_pieces + look_ahead_pieces];
    int64_t pieces = 0;
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < k_pieces; ++i) piece[pieces++] = blocks[b].k + i * panel_bytes;
    for (int64_t p = 0; p < v_panels; ++p)
      for (int64_t b = 0; b < count; ++b) piece[pieces++] = blocks[b].v + p * panel_bytes;
    for (int64_t i = 0; i < look_ahead_pieces; ++i) piece[pieces + i] = next && i < k_pieces ? next + i * panel_bytes : nullptr;
    for (int64_t i = 0; i < pieces; ++i) out[i] = piece[i + look_ahead_pieces] ? piece[i + look_ahead_pieces] - piece[i] : 0;
  }
};

DSO_INLINE F capped(F x, float limit) { return mul(set(limit), tanh(div(x, set(limit)))); }

// Logits of a tile's rows for P blocks: q K^T, capped, masked, and the running maximum per lane.
template <Read T, int R, int P>
static void block_logits(const Block* blocks, int64_t head_dim, const Span* see, int64_t k_pieces, const int64_t* ahead,
                         float softcap, const float* q, float* s, F* top) {
  for (int64_t c = 0; c < block_tokens; c += 16 * tile_cols) {
    F acc[P][R][tile_cols];
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < tile_cols; ++n) acc[p][r][n] = zero();
    for (int64_t k = 0; k < head_dim; k += 32) {
      const int64_t depth = head_dim - k < 32 ? head_dim - k : 32;
      const uint8_t* panel[P];
      int64_t distance[P];
      for (int p = 0; p < P; ++p) {
        panel[p] = blocks[p].k + k / row_depth<T> * row_bytes<T> + c * column_bytes<T>;
        distance[p] = ahead[p * k_pieces + k / 32];
      }
      product<T, R, P>(tile_column<T>(q, k), panel, depth / row_depth<T>, distance, acc);
    }
    for (int p = 0; p < P; ++p)
      for (int n = 0; n < tile_cols; ++n) {
        const int64_t t = c + 16 * n, from = blocks[p].token + t;
        for (int r = 0; r < R; ++r) {
          F x = acc[p][r][n];
          if (blocks[p].k_scale) x = mul(x, load(blocks[p].k_scale + t));
          if (softcap > 0) x = capped(x, softcap);
          const int64_t begin = see[r].begin - from, end = see[r].end - from;
          if (begin > 0 || end < 16) {
            const F seen = keep(x, begin, end, set(minus_infinity()));
            x = see[r].sinks > from ? keep(x, 0, see[r].sinks - from, seen) : seen;
          }
          top[r] = max(top[r], x);
          store(s + r * row_stride + p * block_tokens + t, x);
        }
      }
  }
}

// Converts logits of one row to weights 2^(logit - m), to bf16 for dot, in place otherwise. Returns their fp32 sum.
template <Read T>
DSO_INLINE float weights(float* s, float m, const Block* blocks, int64_t count, uint16_t* p) {
  F total = zero();
  for (int64_t b = 0; b < count; ++b)
    for (int64_t t = 0; t < block_tokens; t += 16) {
      const int64_t at = b * block_tokens + t;
      F x = exp2(sub(load(s + at), set(m)));
      total = add(total, x);
      if (blocks[b].v_scale) x = mul(x, load(blocks[b].v_scale + t));
      if constexpr (narrow<T>)
        round_bf16(p + at, x);
      else
        store(s + at, x);
    }
  return sum(total);
}

// o = o * fade + p V, for P times 16 * tile_cols columns from `first` on.
template <Read T, int R, int P>
static void add_columns(const Stretch& x, int64_t first, int64_t v_dim, const void* p, const float* fade, float* const* o) {
  const int64_t* ahead = x.ahead + x.count * x.k_pieces;
  F acc[P][R][tile_cols];
  int64_t panel[P], offset[P];
  for (int i = 0; i < P; ++i) {
    const int64_t column = first + 16 * tile_cols * i;
    panel[i] = column / 32;
    offset[i] = panel[i] * x.panel_bytes + column % 32 * column_bytes<T>;
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < tile_cols; ++n) {
        const int64_t c = column + 16 * n;
        acc[i][r][n] = c < v_dim ? mul(set(fade[r]), load(o[r] + c, v_dim - c)) : zero();
      }
  }
  for (int64_t b = 0; b < x.count; ++b) {
    const uint8_t* values[P];
    int64_t distance[P];
    for (int i = 0; i < P; ++i) {
      values[i] = x.blocks[b].v + offset[i];
      distance[i] = ahead[panel[i] * x.count + b];
    }
    product<T, R, P>(tile_column<T>(p, b * block_tokens), values, block_tokens / row_depth<T>, distance, acc);
  }
  for (int i = 0; i < P; ++i)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < tile_cols; ++n) {
        const int64_t c = first + 16 * (tile_cols * i + n);
        if (c < v_dim) store(o[r] + c, acc[i][r][n], v_dim - c);
      }
}

// Adds a part of the cache to the state of R rows whose q is in w.q.
template <Read T, int R>
static void attend(const Stretch& x, int64_t k_dim, int64_t v_dim, const Span* see, State& state, Workspace& w) {
  F top[R];
  for (int r = 0; r < R; ++r) top[r] = set(minus_infinity());
  by_several<panels_at_once<R>>(x.count, [&](int64_t b, auto several) {
    block_logits<T, R, several.count>(x.blocks + b, k_dim, see, x.k_pieces, x.ahead + b * x.k_pieces, x.softcap, w.q,
                                      w.s + b * block_tokens, top);
  });
  float fade[16] = {};  // 2^(old m - new m), 0 if no token was visible before
  float base[R];
  for (int r = 0; r < R; ++r) {
    const float t = largest(top[r]), old = state.m[r];
    const float m = t > old ? t : old;
    base[r] = m == minus_infinity() ? 0.0f : m;  // no visible token: 2^(-inf - 0) = 0, not 2^(-inf + inf)
    fade[r] = old - base[r];
    state.m[r] = m;
  }
  store(fade, exp2(load(fade)));
  for (int r = 0; r < R; ++r) {
    const float total = weights<T>(w.s + r * row_stride, base[r], x.blocks, x.count, w.p + r * row_stride);
    state.l[r] = state.l[r] * fade[r] + total;
  }
  const void* p = narrow<T> ? (const void*)w.p : (const void*)w.s;
  constexpr int64_t columns = 16 * tile_cols;
  by_several<panels_at_once<R>>((v_dim + columns - 1) / columns, [&](int64_t i, auto several) {
    add_columns<T, R, several.count>(x, i * columns, v_dim, p, fade, state.o);
  });
}

// Passes a tile's number of rows as a constant.
template <class Call>
DSO_INLINE void with_rows(int rows, Call call) {
  switch (rows) {
    case 1:
      return call(Count<1>{});
    case 2:
      return call(Count<2>{});
    case 3:
      return call(Count<3>{});
    case 4:
      return call(Count<4>{});
  }
  if constexpr (tile_rows == 8) {
    switch (rows) {
      case 5:
        return call(Count<5>{});
      case 6:
        return call(Count<6>{});
      case 7:
        return call(Count<7>{});
      case 8:
        return call(Count<8>{});
    }
  }
}

template <Read T>
static void attend_rows(int rows, const Stretch& x, int64_t k_dim, int64_t v_dim, const Span* see, State& state, Workspace& w) {
  with_rows(rows, [&](auto tile) { attend<T, tile.count>(x, k_dim, v_dim, see, state, w); });
}

// Copies a row of q into the tile, in units of log 2.
template <Read T>
static void bring_query(const float* q, int64_t head_dim, float scale, int r, Workspace& w) {
  const F s = set(scale * log2e);
  float turned[max_head_dim];
  if constexpr (transformed<T>) {
    memcpy(turned, q, head_dim * 4);
    hadamard_inverse(turned, head_dim);
    q = turned;
  }
  for (int64_t i = 0; i < head_dim; i += 16) {
    const F x = mul(load(q + i, head_dim - i), s);
    if constexpr (narrow<T>)
      round_bf16((uint16_t*)w.q + r * row_stride + i, x);
    else
      store(w.q + r * row_stride + i, x);
  }
}

// Query rows [r0, r1) of a sequence, all `group` heads of one kv head. With chosen blocks there is a single row.
struct QueryRows {
  const float* q;
  int64_t q_stride, group, r0, r1, ctx;
  VisibleTokens sight;
  Scores scores;

  Span row(int64_t r) const { return sight.chosen ? Span{0, ctx + r + 1} : visible(ctx, sight, r); }
  Span all() const { return together(row(r0), row(r1 - 1)); }
};

// ---- the blocks of a chunk: those of eight consecutive blocks that a row sees, or eight chosen ones

struct Blocks {
  int64_t number[chunk_blocks];
  int64_t count, next;  // next: the block to read after these, or -1
};

// The first chunk after `chunk` of which the rows see anything, or -1; after -1: the first of all.
static int64_t next_chunk(const QueryRows& rows, int64_t chunk) {
  if (rows.sight.chosen) return (chunk + 1) * chunk_blocks < rows.sight.blocks ? chunk + 1 : -1;
  const Span all = rows.all();
  int64_t next = chunk + 1;
  if (next * attn_chunk >= all.sinks && next < all.begin / attn_chunk) next = all.begin / attn_chunk;
  return next * attn_chunk < all.end ? next : -1;
}

static Blocks blocks_of(const QueryRows& rows, int64_t chunk) {
  const int64_t first = chunk * chunk_blocks, end = first + chunk_blocks;
  Blocks b = {{}, 0, -1};
  if (const int32_t* chosen = rows.sight.chosen) {
    for (int64_t i = first; i < end && i < rows.sight.blocks; ++i) b.number[b.count++] = chosen[i];
    if (end < rows.sight.blocks) b.next = chosen[end];
    return b;
  }
  const Span all = rows.all();
  for (int64_t i = first; i < end; ++i)
    if (all.touches(i)) b.number[b.count++] = i;
  const int64_t window = all.begin / block_tokens, next = end * block_tokens < all.sinks || end > window ? end : window;
  if (all.touches(next)) b.next = next;
  return b;
}

constexpr int64_t nothing_ahead[max_pieces] = {};

// Blocks of the cache against query rows: the heads of a row are consecutive rows of a tile. m[i], l[i] and o[i] belong to head
// i % group of row r0 + i / group.
template <Read T, class Output>
static void attend_blocks(const KvLayout& l, const KvView& view, int64_t kv_head, const QueryRows& rows, const Blocks& read,
                          float* m, float* ell, Output output, Workspace& w) {
  const int64_t count = (rows.r1 - rows.r0) * rows.group, panels = round_up(l.head_dim, 32) / 32;
  const Span all = rows.all();
  Block blocks[chunk_blocks];  // visible to any of the rows
  for (int64_t b = 0; b < read.count; ++b) blocks[b] = visible_block<T>(l, view, kv_head, read.number[b], all, w.room[b]);

  // Read after these blocks: the next ones, or the next head's first, if the caller continues with it.
  const HeadLayout layout = head_layout(l.type, l.head_dim);
  const uint8_t* next = nullptr;
  if (read.next >= 0)
    next = kv_head_block(view, layout, kv_head, read.next);
  else if (kv_head + 1 < l.kv_heads && !rows.sight.chosen)
    next = kv_head_block(view, layout, kv_head + 1, all.sinks > 0 ? 0 : all.begin / block_tokens);

  const int64_t tiles = (count + tile_rows - 1) / tile_rows;
  for (int64_t tile = 0; tile < tiles; ++tile) {  // of equal or nearly equal size
    const int64_t i0 = count * tile / tiles, i1 = count * (tile + 1) / tiles;
    Span see[tile_rows];
    State state = {m + i0, ell + i0, {}};
    for (int64_t i = i0; i < i1; ++i) {
      see[i - i0] = rows.row(rows.r0 + i / rows.group);
      state.o[i - i0] = output(i);
    }
    const Span seen = together(see[0], see[i1 - i0 - 1]);
    Block own[chunk_blocks];
    Stretch part = {
        own, 0, panels, panels, block_tokens / row_depth<T> * row_bytes<T>, nothing_ahead, rows.scores.softcap * log2e};
    for (int64_t b = 0; b < read.count; ++b)
      if (seen.touches(read.number[b])) own[part.count++] = blocks[b];
    if (part.count == 0) continue;
    int64_t ahead[max_pieces];
    if (tile == 0) {  // later tiles find everything in the cache
      part.look_ahead(next, ahead);
      part.ahead = ahead;
    }
    for (int64_t i = i0; i < i1; ++i) {
      const float* row = (const float*)((const char*)rows.q + (rows.r0 + i / rows.group) * rows.q_stride);
      bring_query<T>(row + i % rows.group * l.head_dim, l.head_dim, rows.scores.scale, (int)(i - i0), w);
    }
    attend_rows<T>((int)(i1 - i0), part, l.head_dim, l.head_dim, see, state, w);
  }
}

// The same for any type of cache. Both families read it in the same way: if the ISA has a bf16 dot product, q and weights are
// rounded to bf16 for all but F32 caches; elements of INT8 and INT4 are exact in bf16, and their scale is applied outside the
// product. Outputs are transformed with INT4 until `finish_output`.
template <class Output>
static void attend_cache(const KvLayout& l, const KvView& view, int64_t kv_head, const QueryRows& rows, int64_t chunk, float* m,
                         float* ell, Output output, Workspace& w) {
  const Blocks read = blocks_of(rows, chunk);
  if (l.type == DSO_KV_F32)
    attend_blocks<Read::f32>(l, view, kv_head, rows, read, m, ell, output, w);
  else if (l.type == DSO_KV_BF16)
    attend_blocks<has_dot_bf16 ? Read::dot : Read::bf16>(l, view, kv_head, rows, read, m, ell, output, w);
  else if (l.type == DSO_KV_INT8)
    attend_blocks<has_dot_bf16 ? Read::i8_dot : Read::i8>(l, view, kv_head, rows, read, m, ell, output, w);
  else
    attend_blocks<has_dot_bf16 ? Read::i4_dot : Read::i4>(l, view, kv_head, rows, read, m, ell, output, w);
}

DSO_INLINE void finish_output(const KvLayout& l, float* o) {
  if (l.type == DSO_KV_INT4) hadamard_inverse(o, l.head_dim);
}
}  // namespace dso::DSO_ISA_NAMESPACE
