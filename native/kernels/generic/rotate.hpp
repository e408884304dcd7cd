// Rotates cached keys to other positions, one block at a time and in place. RoPE rotations compose: a key computed at one
// position and rotated by the difference of two angles equals the key at the other position, up to the rounding of its storage.
#pragma once
#include "elementwise.hpp"
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// A K panel as floats, [head_dim][32 tokens]; lanes are tokens.
static void rotate_panel(float* x, const Rotation& turn) {
  const int64_t half = turn.rot / 2;
  for (int64_t i = 0; i < half; ++i) {
    float* first = x + (turn.offset + (turn.interleaved ? 2 * i : i)) * block_tokens;
    float* second = first + (turn.interleaved ? 1 : half) * block_tokens;
    for (int64_t t = 0; t < block_tokens; t += lanes) {
      const F a = load(first + t), b = load(second + t);
      const F c = load(turn.table + i * block_tokens + t), s = load(turn.table + (half + i) * block_tokens + t);
      store(first + t, sub(mul(a, c), mul(b, s)));
      store(second + t, add(mul(b, c), mul(a, s)));
    }
  }
}

static void rotate_bf16_panel(uint8_t* panel, int64_t d, const Rotation& turn) {
  float x[max_head_dim * block_tokens];
  for (int64_t i = 0; i < d; i += 2)
    for (int64_t t = 0; t < block_tokens; t += lanes) {
      const B pair = load_bytes(panel + i / 2 * 128 + t * 4);
      store(x + i * block_tokens + t, even_bf16(pair));
      store(x + (i + 1) * block_tokens + t, odd_bf16(pair));
    }
  rotate_panel(x, turn);
  for (int64_t i = 0; i < d; i += 2)
    for (int64_t t = 0; t < block_tokens; t += lanes) {
      uint16_t even[lanes], odd[lanes];
      store_bf16(even, load(x + i * block_tokens + t));
      store_bf16(odd, load(x + (i + 1) * block_tokens + t));
      store_bytes(panel + i / 2 * 128 + t * 4, pair_bf16(load_bf16(even), load_bf16(odd)));
    }
}

// int8_row's rule for each token: the maximum of a key may change when it is rotated.
static void rotate_int8_panel(uint8_t* panel, float* scales, int64_t d, const Rotation& turn) {
  float x[max_head_dim * block_tokens];
  for (int64_t t = 0; t < block_tokens; t += lanes) {
    const F scale = load(scales + t);
    for (int64_t i = 0; i < d; ++i)
      store(x + i * block_tokens + t, mul(to_float(load_i8(panel + i * block_tokens + t)), scale));
  }
  rotate_panel(x, turn);
  for (int64_t t = 0; t < block_tokens; t += lanes) {
    F top = zero(), poison = zero();
    for (int64_t i = 0; i < d; ++i) {
      const F v = load(x + i * block_tokens + t);
      top = max(top, abs(v));
      poison = fma(v, zero(), poison);
    }
    float largest_of[lanes], poison_of[lanes], inverse_of[lanes];
    store(largest_of, top);
    store(poison_of, poison);
    for (int64_t j = 0; j < lanes; ++j) {
      const float m = largest_of[j];
      const bool tiny = m < 1e-36f;
      inverse_of[j] = tiny ? 0.0f : 127.0f / m;
      scales[t + j] = poison_of[j] != poison_of[j] ? __builtin_nanf("") : tiny ? 0.0f : m / 127.0f;
    }
    const F inverse = load(inverse_of);
    for (int64_t i = 0; i < d; ++i)
      store_i8(panel + i * block_tokens + t, to_int(mul(load(x + i * block_tokens + t), inverse)));
  }
}

static void rotate_int4_panel(uint8_t* panel, float* scales, int64_t d, const Rotation& turn) {
  float x[max_head_dim * block_tokens], key[max_head_dim];
  read_int4_panel(panel, scales, d, x);
  rotate_panel(x, turn);
  for (int64_t t = 0; t < block_tokens; ++t) {
    for (int64_t i = 0; i < d; ++i) key[i] = x[i * block_tokens + t];
    write_int4_key(key, d, panel, scales, t);
  }
}

static void kv_rotate(const KvLayout& l, const KvView& v, int64_t block, const Rotation& turn) {
  const HeadLayout layout = head_layout(l.type, l.head_dim);
  for (int64_t head = 0; head < l.kv_heads; ++head) {
    uint8_t* at = kv_head_block(v, layout, head, block);
    if (l.type == DSO_KV_F32)
      rotate_panel((float*)at, turn);
    else if (l.type == DSO_KV_BF16)
      rotate_bf16_panel(at, l.head_dim, turn);
    else if (l.type == DSO_KV_INT4)
      rotate_int4_panel(at, (float*)(at + layout.k_scale), l.head_dim, turn);
    else
      rotate_int8_panel(at, (float*)(at + layout.k_scale), l.head_dim, turn);
  }
}

// The rotated elements of a row; only these are rounded again.
static void rotate_row(uint8_t* numbers, bool single, const Rotation& turn, int64_t slot, float* room) {
  const float* table = turn.table + slot * turn.rot;
  uint8_t* at = numbers + turn.offset * (single ? 4 : 2);
  if (single) return rope((float*)at, table, 1, turn.rot, 0, turn.rot, turn.interleaved, (float*)at);
  read_bf16(at, turn.rot, room);
  rope(room, table, 1, turn.rot, 0, turn.rot, turn.interleaved, room);
  write_bf16(room, turn.rot, at);
}

static void latent_rotate(const KvLayout& l, const KvView& v, int64_t block, const Rotation& key, const Rotation* index,
                          float* room) {
  const bool single = l.type == DSO_KV_F32;
  for (int64_t slot = 0; slot < block_tokens; ++slot) {
    const int64_t token = block * block_tokens + slot;
    uint8_t* row = latent_row(l, v, token);
    if (l.type == DSO_KV_INT4) {
      latent_part(l, row, l.rank, l.rope, room);
      rotate_row((uint8_t*)room, true, key, slot, nullptr);
      write_int8_groups(room, l.rope, row + int4_rope(l));
    } else {
      rotate_row(row + l.row_bytes - (single ? 4 : 2) * l.rope, single, key, slot, room);  // the row's last elements
    }
    if (index) rotate_row(index_row(l, v, token), single, *index, slot, room);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
