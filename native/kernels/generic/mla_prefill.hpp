// Multi-head latent attention, expanded: keys and values of one head are made out of a chunk's latents, laid out as a cache block
// holds them (kv.hpp), and attention's tiles go over them: for many rows of q that costs less than attending to the latents.
//
// A row's bits depend on its own q and the tokens it sees, as in attention.hpp. Values of later tokens may be NaN or infinite; a
// block that holds such is taken row by row, with zeros for what the row does not see.
#pragma once
#include "attention.hpp"
#include "attention_prefill.hpp"
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace expanded {

struct Panels {  // of a chunk; blocks as HeadLayout has them lie behind it
  int64_t tokens;
  bool poisoned[chunk_blocks];  // a value is NaN or infinite
};
constexpr int64_t blocks_at = (sizeof(Panels) + 63) / 64 * 64;

DSO_INLINE HeadLayout layout(const MlaHead& h) { return head_layout(h.single ? DSO_KV_F32 : DSO_KV_BF16, h.nope + h.rope, h.v_dim); }

static bool finite(const float* x, int64_t n) {
  F poison = zero();
  for (int64_t i = 0; i < n; i += 16) poison = fma(load(x + i, n - i), zero(), poison);
  return !any_nan(poison);
}

// Slots [slot, slot + n) of a block; slot is even, or n is 1.
static void write_values(const MlaHead& h, const HeadLayout& l, const float* v, int64_t stride, int64_t slot, int64_t n, uint8_t* values) {
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

template <Read T>
static void attend_head(const MlaHead& h, const uint8_t* panels, int64_t chunk, const float* q, int64_t q_stride, int64_t r0, int64_t r1, int64_t ctx,
                        float scale, float* m, float* sum, float* o, int64_t o_stride, Workspace& w) {
  const Panels& p = *(const Panels*)panels;
  const HeadLayout l = layout(h);
  const int64_t start = chunk * attn_chunk, k_dim = h.nope + h.rope, last = (p.tokens + block_tokens - 1) / block_tokens;
  Block blocks[chunk_blocks];
  for (int64_t b = 0; b < last; ++b) {
    const uint8_t* block = panels + blocks_at + b * l.bytes;
    blocks[b] = {block, block + l.v, nullptr, nullptr, start + b * block_tokens};
  }
  const auto output = [=](int64_t r) { return (float*)((char*)o + r * o_stride); };
  const auto tile = [&](int64_t begin, int64_t end, const Block* from) {  // rows [begin, end)
    Span see[tile_rows];
    State state = {m + begin - r0, sum + begin - r0, {}};
    for (int64_t r = begin; r < end; ++r) {
      see[r - begin] = {0, ctx + r + 1};
      state.o[r - begin] = output(r);
      bring_query<T>((const float*)((const char*)q + r * q_stride), k_dim, scale, (int)(r - begin), w);
    }
    const int64_t seen = (ctx + end - start + block_tokens - 1) / block_tokens;
    const Stretch part = {from, seen < last ? seen : last, round_up(k_dim, 32) / 32, round_up(h.v_dim, 32) / 32, l.panel, nothing_ahead};
    attend_rows<T>((int)(end - begin), part, k_dim, h.v_dim, see, state, w);
  };

  const int64_t first = start - ctx > r0 ? start - ctx : r0;  // rows before it see nothing of the chunk
  const int64_t count = r1 - first, tiles = (count + tile_rows - 1) / tile_rows;
  for (int64_t i = 0; i < tiles; ++i) {  // of equal size, or nearly
    const int64_t begin = first + count * i / tiles, end = first + count * (i + 1) / tiles;
    bool poisoned = false;  // by a token that not every row sees
    for (int64_t b = 0; b < last; ++b) poisoned = poisoned || (p.poisoned[b] && ctx + begin + 1 < start + (b + 1) * block_tokens);
    if (!poisoned) {
      tile(begin, end, blocks);
      continue;
    }
    for (int64_t r = begin; r < end; ++r) {
      Block clean[chunk_blocks];
      for (int64_t b = 0; b < last; ++b) {
        clean[b] = blocks[b];
        if (!p.poisoned[b] || ctx + r + 1 >= blocks[b].token + block_tokens) continue;
        for (int64_t column = 0; column < h.v_dim; column += 32)
          copy_seen<T>(blocks[b].v + column / 32 * l.panel, blocks[b].token, {0, ctx + r + 1}, w.room[b] + column / 32 * l.panel);
        clean[b].v = w.room[b];
      }
      tile(r, r + 1, clean);
    }
  }
  for (int64_t r = first; r < r1 && ctx + r < start + attn_chunk; ++r) {
    float* out = output(r);
    for (int64_t c = 0; c < h.v_dim; c += 16) store(out + c, div(load(out + c, h.v_dim - c), set(sum[r - r0])), h.v_dim - c);
  }
}
}  // namespace expanded

static void mla_rows(const KvLayout& l, const KvView& v, int64_t first, int64_t n, int32_t kind, float* room, uint8_t* rows, int64_t stride) {
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

static int64_t mla_panel_bytes(const MlaHead& head) { return expanded::blocks_at + chunk_blocks * expanded::layout(head).bytes; }

static void mla_panels(const KvLayout& l, const KvView& v, const MlaHead& h, int64_t first, int64_t n, const float* kv, int64_t stride, uint8_t* panels) {
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
      const uint8_t* turned = latent_row(l, v, first + t) + l.row_bytes - (l.type == DSO_KV_F32 ? 4 : 2) * l.rope;
      if (l.type == DSO_KV_F32) memcpy(key + h.nope, turned, 4 * l.rope);
      else read_bf16(turned, l.rope, key + h.nope);
      if (h.single) write_f32_key(key, h.nope + h.rope, at, t);
      else write_bf16_key(key, h.nope + h.rope, at, t);
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

static void mla_expanded(const MlaHead& h, const uint8_t* panels, int64_t chunk, const float* q, int64_t q_stride, int64_t r0, int64_t r1, int64_t ctx,
                         float scale, float* m, float* sum, float* o, int64_t o_stride, uint8_t* scratch) {
  Workspace& w = *(Workspace*)scratch;
  if (chunk == 0)
    for (int64_t r = r0; r < r1; ++r) {
      m[r - r0] = minus_infinity();
      sum[r - r0] = 0;
      memset((char*)o + r * o_stride, 0, h.v_dim * 4);
    }
  constexpr Read pairs = has_dot_bf16 ? Read::dot : Read::bf16;
  if (h.single) expanded::attend_head<Read::f32>(h, panels, chunk, q, q_stride, r0, r1, ctx, scale, m, sum, o, o_stride, w);
  else expanded::attend_head<pairs>(h, panels, chunk, q, q_stride, r0, r1, ctx, scale, m, sum, o, o_stride, w);
}
}  // namespace dso::DSO_ISA_NAMESPACE
