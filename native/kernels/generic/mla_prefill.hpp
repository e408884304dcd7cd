// Multi-head latent attention, expanded: keys and values of one head are computed from a chunk's latents, laid out as in a
// cache block (kv.hpp), and processed by attention's tiles: for many rows of q this costs less than attending to the latents.
//
// A row's bits depend on its own q and the tokens it sees, as in attention.hpp. Values of other tokens may be NaN or infinite;
// a block with such values is processed row by row, with zeros for hidden tokens.
#pragma once
#include "attention.hpp"
#include "attention_prefill.hpp"
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace expanded {

struct Panels {  // for one chunk; followed by blocks laid out as in HeadLayout
  int64_t tokens;
  bool poisoned[chunk_blocks];  // a value is NaN or infinite
};
constexpr int64_t blocks_at = (sizeof(Panels) + 63) / 64 * 64;

DSO_INLINE HeadLayout layout(const MlaHead& h) {
  return head_layout(h.single ? DSO_KV_F32 : DSO_KV_BF16, h.nope + h.rope, h.v_dim);
}

static bool finite(const float* x, int64_t n) {
  F poison = zero();
  for (int64_t i = 0; i < n; i += 16) poison = fma(load(x + i, n - i), zero(), poison);
  return !any_nan(poison);
}

// Slots [slot, slot + n) of a block; slot is even, or n is 1.
static void write_values(const MlaHead& h, const HeadLayout& l, const float* v, int64_t stride, int64_t slot, int64_t n,
                         uint8_t* values) {
  for (int64_t i = 0; i < n; ++i, v = (const float*)((const char*)v + stride)) {
    if (h.single) {
      write_f32_value(v, h.v_dim, values, l, slot + i);
    } else if (i + 1 < n) {
      const float* next = (const float*)((const char*)v + stride);
      write_bf16_values(v, next, h.v_dim, values, l, slot + i);
      ++i, v = next;
    } else {
      write_bf16_value(v, h.v_dim, values, l, slot + i);
    }
  }
}

struct Task {  // rows [r0, r1) of a sequence times a chunk
  const float* q;
  int64_t q_stride, r0, r1, ctx;
  VisibleTokens sight;
  float scale;
  float *m, *sum, *o;
  int64_t o_stride;
  Span row(int64_t r) const { return visible(ctx, sight, r); }
};

// Rows [begin, end) of one tile. For a single row, partly visible blocks that contain a NaN or infinity are cleaned.
template <Read T>
static void attend_tile(const MlaHead& h, const uint8_t* panels, int64_t start, const Task& t, int64_t begin, int64_t end,
                        Workspace& w) {
  const Panels& p = *(const Panels*)panels;
  const HeadLayout l = layout(h);
  const int64_t k_dim = h.nope + h.rope;
  Span see[tile_rows];
  State state = {t.m + begin - t.r0, t.sum + begin - t.r0, {}};
  for (int64_t r = begin; r < end; ++r) {
    see[r - begin] = t.row(r);
    state.o[r - begin] = (float*)((char*)t.o + r * t.o_stride);
    bring_query<T>((const float*)((const char*)t.q + r * t.q_stride), k_dim, t.scale, (int)(r - begin), w);
  }
  const Span seen = together(see[0], see[end - begin - 1]);
  Block blocks[chunk_blocks];
  int64_t count = 0;
  for (int64_t b = 0; b * block_tokens < p.tokens; ++b) {
    const int64_t number = start / block_tokens + b;
    if (!seen.touches(number)) continue;
    const uint8_t* block = panels + blocks_at + b * l.bytes;
    blocks[count] = {block, block + l.v, nullptr, nullptr, number * block_tokens};
    if (end - begin == 1 && p.poisoned[b] && !seen.fills(number)) {
      for (int64_t column = 0; column < h.v_dim; column += 32)
        copy_seen<T>(block + l.v + column / 32 * l.panel, number * block_tokens, seen, w.room[b] + column / 32 * l.panel);
      blocks[count].v = w.room[b];
    }
    ++count;
  }
  const Stretch part = {blocks, count, round_up(k_dim, 32) / 32, round_up(h.v_dim, 32) / 32, l.panel, nothing_ahead};
  if (count > 0) attend_rows<T>((int)(end - begin), part, k_dim, h.v_dim, see, state, w);
}

template <Read T>
static void attend_head(const MlaHead& h, const uint8_t* panels, int64_t start, const Task& t, Workspace& w) {
  const Panels& p = *(const Panels*)panels;
  const auto sees = [&](int64_t r) {
    const Span s = t.row(r);
    return s.end > start && (s.begin < start + p.tokens || s.sinks > start);
  };
  int64_t first = t.r0, last = t.r1;
  while (first < last && !sees(first)) ++first;
  while (last > first && !sees(last - 1)) --last;

  const int64_t count = last - first, tiles = (count + tile_rows - 1) / tile_rows;
  for (int64_t i = 0; i < tiles; ++i) {  // of equal or nearly equal size
    const int64_t begin = first + count * i / tiles, end = first + count * (i + 1) / tiles;
    const Span early = t.row(begin), late = t.row(end - 1);
    bool poisoned = false;  // by a token that not every row sees
    for (int64_t b = 0; b * block_tokens < p.tokens; ++b) {
      const int64_t number = start / block_tokens + b;
      const bool seen = together(early, late).touches(number), by_all = early.fills(number) && late.fills(number);
      poisoned = poisoned || (seen && !by_all && p.poisoned[b]);
    }
    if (poisoned)
      for (int64_t r = begin; r < end; ++r) attend_tile<T>(h, panels, start, t, r, r + 1, w);
    else
      attend_tile<T>(h, panels, start, t, begin, end, w);
  }
}
}  // namespace expanded

static void mla_rows(const KvLayout& l, const KvView& v, int64_t first, int64_t n, int32_t kind, float* room, uint8_t* rows,
                     int64_t stride) {
  for (int64_t t = 0; t < n; ++t, rows += stride) {
    const uint8_t* row = latent_row(l, v, first + t);
    if (kind == DSO_SLOT_F32) {
      latent_numbers(l, row, (float*)rows, nullptr);
    } else {
      latent_numbers(l, row, room, nullptr);
      convert(kind, room, 0, l.rank, l.rank, rows);
    }
  }
}

static int64_t mla_panel_bytes(const MlaHead& head) {
  return expanded::blocks_at + chunk_blocks * expanded::layout(head).bytes;
}

static void mla_panels(const KvLayout& l, const KvView& v, const MlaHead& h, int64_t first, int64_t n, const float* kv,
                       int64_t stride, uint8_t* panels) {
  expanded::Panels& p = *(expanded::Panels*)panels;
  const HeadLayout layout = expanded::layout(h);
  p.tokens = first % attn_chunk + n;
  while (n > 0) {
    const int64_t block = first % attn_chunk / block_tokens, count = n < block_tokens ? n : block_tokens;
    uint8_t* at = panels + expanded::blocks_at + block * layout.bytes;
    p.poisoned[block] = false;
    for (int64_t t = 0; t < count; ++t) {
      const float* row = (const float*)((const char*)kv + t * stride);
      float key[max_head_dim];
      memcpy(key, row, 4 * h.nope);
      latent_part(l, latent_row(l, v, first + t), l.rank, l.rope, key + h.nope);
      if (h.single)
        write_f32_key(key, h.nope + h.rope, at, t);
      else
        write_bf16_key(key, h.nope + h.rope, at, t);
      p.poisoned[block] = p.poisoned[block] || !expanded::finite(row + h.nope, h.v_dim);
    }
    expanded::write_values(h, layout, kv + h.nope, stride, 0, count, at + layout.v);
    const float nothing[max_head_dim] = {};
    for (int64_t t = count; t < block_tokens; ++t) expanded::write_values(h, layout, nothing, 0, t, 1, at + layout.v);
    first += count;
    n -= count;
    kv = (const float*)((const char*)kv + count * stride);
  }
}

static void mla_expanded(const MlaHead& h, const uint8_t* panels, int64_t chunk, const float* q, int64_t q_stride, int64_t r0,
                         int64_t r1, int64_t ctx, const VisibleTokens& sight, float scale, float* m, float* sum, float* o,
                         int64_t o_stride, uint8_t* scratch) {
  Workspace& w = *(Workspace*)scratch;
  const expanded::Task task = {q, q_stride, r0, r1, ctx, sight, scale, m, sum, o, o_stride};
  constexpr Read pairs = has_dot_bf16 ? Read::dot : Read::bf16;
  if (h.single)
    expanded::attend_head<Read::f32>(h, panels, chunk * attn_chunk, task, w);
  else
    expanded::attend_head<pairs>(h, panels, chunk * attn_chunk, task, w);
}
}  // namespace dso::DSO_ISA_NAMESPACE
