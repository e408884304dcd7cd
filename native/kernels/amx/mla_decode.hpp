// Absorbed latent attention (generic/mla_decode.hpp) on tile registers, for 16 heads of a query.
//
//   q K^T  rows of the cache are the rows of A tiles, the packed query is a B tile for every 32 elements: C is [tokens][heads],
//          as softmax reads it. Tokens whose rows are not evenly spaced are copied first.
//   p V    weights, transposed, are an A tile of [heads][32 tokens]; B tiles are pairs of tokens' rows, which mla_tokens stores
//          in panels once for all rows of q and all heads.
//
// Tokens are multiplied in groups of 32, counted from the start of the chunk or of the list of chosen tokens, whatever the
// first token given. A hidden token has a weight of zero, and its values are multiplied by it, unless one of its group's is
// infinite or NaN: then the values of hidden tokens are left out. So a query's bits depend only on itself and the tokens it
// sees.
//
// Caches in fp32, and rows whose parts are no multiples of 32 elements, use vectors.
#pragma once
#include "../generic/mla_decode.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace tiled {

constexpr int64_t group_tokens = 32;  // of a tile of weights
constexpr int64_t chunk_groups = attn_chunk / group_tokens;
constexpr int64_t columns_bytes = 1024;  // a B tile: 16 pairs of tokens, 16 columns
constexpr int64_t rows_ahead = 8;        // tokens whose rows are fetched ahead

struct SixteenRows {
  const uint8_t* first;
  int64_t stride;  // bytes
};

struct LatentScratch {
  alignas(64) float s[attn_chunk * mla_heads];     // logits
  alignas(64) uint8_t pairs[attn_chunk / 2 * 64];  // weights in bf16, [tokens / 2][16 heads][2]
  alignas(64) uint8_t p[chunk_groups][1024];       // the same, [16 heads][32 tokens]
  alignas(64) float c[4][16][16];
  int64_t begin, end;               // places of the tokens in their chunk or list
  const uint8_t* rows[attn_chunk];  // of the tokens, at their places
  SixteenRows a[attn_chunk / 16];   // the same as A tiles
  bool finite[chunk_groups];        // whether a group's values are
};  // followed by a row of zeros, copies of rows, the groups' panels, and two panels without hidden tokens

DSO_INLINE bool in_tiles(const KvLayout& l) { return l.type != DSO_KV_F32 && l.rank % 32 == 0 && l.rope % 32 == 0; }
DSO_INLINE int64_t nothing_at() { return round_up(sizeof(LatentScratch), 64); }
DSO_INLINE int64_t copies_at(const KvLayout& l) { return nothing_at() + mla::room_bytes(l); }
DSO_INLINE int64_t panels_at(const KvLayout& l) { return copies_at(l) + attn_chunk * mla::room_bytes(l); }
DSO_INLINE int64_t panel_bytes(const KvLayout& l) { return l.rank / 16 * columns_bytes; }

static int64_t mla_scratch(const KvLayout& l) {
  return in_tiles(l) ? panels_at(l) + (chunk_groups + 2) * panel_bytes(l) : DSO_ISA_NAMESPACE::mla_scratch(l);
}

// The values of a group's tokens [begin, end), as numbered in the group; the others' are zero. Returns whether all are finite.
static bool write_panel(const KvLayout& l, const uint8_t* const* rows, const uint8_t* nothing, int64_t begin, int64_t end,
                        uint8_t* panel) {
  const B zeros = load_bytes(nothing);
  F poison = zero();
  for (int64_t t = 0; t < group_tokens; t += 2, panel += 64) {
    const uint8_t *x = t >= begin && t < end ? rows[t] : nothing, *y = t + 1 >= begin && t + 1 < end ? rows[t + 1] : nothing;
    uint8_t* to = panel;
    for (int64_t column = 0; column < l.rank; column += 32, to += 2 * columns_bytes) {
      B low, high;
      pair_columns(load_bytes(x + 2 * column), load_bytes(y + 2 * column), low, high);
      store_bytes(to, low);
      store_bytes(to + columns_bytes, high);
      poison = dot_bf16(dot_bf16(poison, low, zeros), high, zeros);
    }
  }
  return !any_nan(poison);
}

static void mla_tokens(const KvLayout& l, const KvView& v, const int32_t* chosen, int64_t first, int64_t n, uint8_t* scratch) {
  if (!in_tiles(l)) return DSO_ISA_NAMESPACE::mla_tokens(l, v, chosen, first, n, scratch);
  LatentScratch& w = *(LatentScratch*)scratch;
  const int64_t room = mla::room_bytes(l), width = mla::width(l);
  uint8_t *nothing = scratch + nothing_at(), *copies = scratch + copies_at(l);
  memset(nothing, 0, room);
  w.begin = chosen ? 0 : first % attn_chunk;
  w.end = w.begin + n;
  const auto row = [&](int64_t t) { return latent_row(l, v, chosen ? chosen[t - w.begin] : first + t - w.begin); };
  for (int64_t t = w.begin; t < w.end; ++t) {
    const uint8_t* soon = t + rows_ahead < w.end ? row(t + rows_ahead) : nullptr;
    for (int64_t i = 0; soon && i < l.row_bytes; i += 64) __builtin_prefetch(soon + i);
    w.rows[t] = row(t);
    if (!has_scales(l.type)) continue;
    (l.type == DSO_KV_INT4 ? int4_latent_to_bf16 : int8_latent_to_bf16)(l, w.rows[t], copies + t * room);
    w.rows[t] = copies + t * room;
  }
  const int64_t group = w.begin / group_tokens;
  // What a tile has before the first token and after the last one is not seen.
  for (int64_t t = group * group_tokens; t < round_up(w.end, group_tokens); t += 16) {
    const int64_t begin = t < w.begin ? w.begin : t, end = t + 16 < w.end ? t + 16 : w.end;
    bool even = end - begin == 16;
    for (int64_t i = t + 2; even && i < end; ++i) even = w.rows[i] - w.rows[i - 1] == w.rows[t + 1] - w.rows[t];
    w.a[t / 16] = even ? SixteenRows{w.rows[t], w.rows[t + 1] - w.rows[t]} : SixteenRows{copies + t * room, room};
    if (even || has_scales(l.type)) continue;
    for (int64_t i = begin; i < end; ++i) memcpy(copies + i * room, w.rows[i], 2 * width);
  }
  for (int64_t g = group, t = g * group_tokens; t < w.end; t += group_tokens, ++g)
    w.finite[g] = write_panel(l, w.rows + t, nothing, w.begin - t, w.end - t, scratch + panels_at(l) + g * panel_bytes(l));
}

// Logits of groups [g0, g1), two at a time.
static void latent_logits(Tiles& tiles, const KvLayout& l, const uint8_t* q, int64_t g0, int64_t g1, LatentScratch& w) {
  for (int64_t g = g0; g < g1; g += 2) {
    const bool two = g + 1 < g1;
    const SixteenRows* a = w.a + 2 * g;
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
    for (int64_t step = 0; step < mla::width(l) / 32; ++step) {
      tiles.load<6>(q + 1024 * step, 64);
      tiles.load<4>(a[0].first + 64 * step, a[0].stride), tiles.dot_bf16<0, 4, 6>();
      tiles.load<5>(a[1].first + 64 * step, a[1].stride), tiles.dot_bf16<2, 5, 6>();
      if (!two) continue;
      tiles.load<4>(a[2].first + 64 * step, a[2].stride), tiles.dot_bf16<1, 4, 6>();
      tiles.load<5>(a[3].first + 64 * step, a[3].stride), tiles.dot_bf16<3, 5, 6>();
    }
    float* s = w.s + g * group_tokens * mla_heads;
    tiles.store<0>(s, 64), tiles.store<2>(s + 256, 64);
    if (two) tiles.store<1>(s + 512, 64), tiles.store<3>(s + 768, 64);
  }
}

// The panel of a group for a query that sees the tokens at places [begin, end). room: for a panel without the others.
static const uint8_t* panel_of(const KvLayout& l, const LatentScratch& w, const uint8_t* scratch, int64_t g, int64_t begin,
                               int64_t end, uint8_t* room) {
  const int64_t t = g * group_tokens;
  const bool whole = (begin <= t || begin == w.begin) && (end >= t + group_tokens || end == w.end);
  if (whole || w.finite[g]) return scratch + panels_at(l) + g * panel_bytes(l);
  write_panel(l, w.rows + t, scratch + nothing_at(), begin - t, end - t, room);
  return room;
}

static void attend(const KvLayout& l, const uint8_t* q, int64_t heads, int64_t begin, int64_t end, float* part,
                   uint8_t* scratch) {
  LatentScratch& w = *(LatentScratch*)scratch;
  const int64_t g0 = begin / group_tokens, g1 = (end + group_tokens - 1) / group_tokens, stride = l.rank + 16;
  Tiles tiles(64);
  tiles.shape(16, 16);
  latent_logits(tiles, l, q, g0, g1, w);
  const F hidden = set(minus_infinity());
  for (int64_t t = g0 * group_tokens; t < begin; ++t) store(w.s + t * mla_heads, hidden);
  for (int64_t t = end; t < g1 * group_tokens; ++t) store(w.s + t * mla_heads, hidden);
  const int64_t first = g0 * group_tokens;
  const mla::Softmax state = mla::weigh<mla::Pair>(w.s + first * mla_heads, (g1 - g0) * group_tokens, w.pairs + first / 2 * 64);
  mla::write_softmax(state, heads, part, stride);

  const uint8_t* panels[chunk_groups];
  uint8_t* room = scratch + panels_at(l) + chunk_groups * panel_bytes(l);
  for (int64_t g = g0; g < g1; ++g) {
    panels[g] = panel_of(l, w, scratch, g, begin, end, room + (g > g0) * panel_bytes(l));
    B x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = load_bytes(w.pairs + (g * 16 + i) * 64);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_bytes(w.p[g] + 64 * i, x[i]);
  }
  for (int64_t column = 0; column < l.rank; column += 32) {
    const int64_t at = column / 16 * columns_bytes;
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
    for (int64_t g = g0; g < g1; ++g) {  // even and odd groups are separate chains, to hide the latency of additions
      tiles.load<6>(panels[g] + at, 64), tiles.load<7>(panels[g] + at + columns_bytes, 64);
      if (g % 2 == 0)
        tiles.load<4>(w.p[g], 64), tiles.dot_bf16<0, 4, 6>(), tiles.dot_bf16<1, 4, 7>();
      else
        tiles.load<5>(w.p[g], 64), tiles.dot_bf16<2, 5, 6>(), tiles.dot_bf16<3, 5, 7>();
    }
    tiles.store<0>(w.c[0], 64), tiles.store<1>(w.c[1], 64), tiles.store<2>(w.c[2], 64), tiles.store<3>(w.c[3], 64);
    for (int64_t h = 0; h < heads; ++h) {
      F x = add(load(w.c[0][h]), load(w.c[2][h])), y = add(load(w.c[1][h]), load(w.c[3][h]));
      in_columns(x, y);
      store(part + h * stride + 16 + column, x);
      store(part + h * stride + 32 + column, y);
    }
  }
}

static void mla_attend(const KvLayout& l, const uint8_t* packed, int64_t heads, int64_t begin, int64_t end, float* part,
                       uint8_t* scratch) {
  if (begin >= end || !in_tiles(l)) return DSO_ISA_NAMESPACE::mla_attend(l, packed, heads, begin, end, part, scratch);
  const int64_t before = ((const LatentScratch*)scratch)->begin;
  attend(l, packed, heads, before + begin, before + end, part, scratch);
  if (l.type == DSO_KV_INT4)
    for (int64_t h = 0; h < heads; ++h) finish_latent(l, part + h * (l.rank + 16) + 16);
}

}  // namespace tiled
}  // namespace dso::DSO_ISA_NAMESPACE
