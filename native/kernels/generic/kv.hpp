// The layout inside a cache block: 32 tokens of one layer, kv head after kv head. A head's part is
//
//   K panel | V panels | with INT8 and INT4: scale of K [32], scale of V [32]     (one fp32 scale per token and head)
//
// A panel has 32 columns and is directly an operand of attention's product: K as [head_dim][32 tokens], so that a register
// holds the logits of 16 tokens and no sum runs across lanes; V as ceil(head_dim/32) panels of [32 tokens][32 columns]. F32 and
// INT8 panels are plain rows; BF16 panels hold pairs of rows, [rows/2][32][2], the operand of dot_bf16. INT4 panels hold pairs
// of rows too, one byte per column, of transformed keys and values (kv_int4.hpp). A token is written without changing its
// neighbors; with INT4, no other thread may write to the block meanwhile. Slots past a sequence's end and columns past head_dim
// are undefined.
#pragma once
#include "kv_int4.hpp"

namespace dso::DSO_ISA_NAMESPACE {

constexpr int64_t block_tokens = DSO_BLOCK_TOKENS;

DSO_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct HeadLayout {  // offsets in bytes
  int64_t panel;     // from one V panel to the next
  int64_t v, k_scale, v_scale;
  int64_t bytes;  // per kv head in a block
};

DSO_INLINE bool has_scales(int32_t type) { return type == DSO_KV_INT8 || type == DSO_KV_INT4; }

DSO_INLINE HeadLayout head_layout(int32_t type, int64_t k_dim, int64_t v_dim) {
  const int64_t bits = type == DSO_KV_F32 ? 32 : type == DSO_KV_BF16 ? 16 : type == DSO_KV_INT8 ? 8 : 4;
  HeadLayout l;
  l.panel = block_tokens * 32 * bits / 8;
  l.v = round_up(k_dim * block_tokens * bits / 8, 64);
  l.k_scale = l.v + round_up(v_dim, 32) / 32 * l.panel;
  l.v_scale = l.k_scale + block_tokens * 4;
  l.bytes = has_scales(type) ? l.v_scale + block_tokens * 4 : l.k_scale;
  return l;
}
DSO_INLINE HeadLayout head_layout(int32_t type, int64_t head_dim) { return head_layout(type, head_dim, head_dim); }

static int64_t kv_layer_bytes(int32_t type, int64_t kv_heads, int64_t head_dim) {
  return kv_heads * head_layout(type, head_dim).bytes;
}

DSO_INLINE uint8_t* kv_head_block(const KvView& v, const HeadLayout& h, int64_t kv_head, int64_t block) {
  return v.base + v.table[block] * v.block_stride + kv_head * h.bytes;
}

// One token's row of one head, rounded; zero-padded to a multiple of 16.
static void bf16_row(const float* x, int64_t d, uint16_t* out) {
  for (int64_t i = 0; i < d; i += 16) store_bf16(out + i, load(x + i, d - i));
}

// int8 = rint(x * 127 / max|x|). A row with a NaN or an infinity has scale NaN, an all-zero or tiny row scale 0.
static float int8_row(const float* x, int64_t d, int8_t* out) {
  F top = zero(), poison = zero();
  for (int64_t i = 0; i < d; i += 16) {
    const F v = load(x + i, d - i);
    top = max(top, abs(v));
    poison = fma(v, zero(), poison);
  }
  const float m = largest(top);
  const bool tiny = m < 1e-36f;  // 127 / m would overflow
  const F inverse = set(tiny ? 0.0f : 127.0f / m);
  for (int64_t i = 0; i < d; i += 16) store_i8(out + i, to_int(mul(load(x + i, d - i), inverse)));
  if (any_nan(poison)) return __builtin_nanf("");
  return tiny ? 0.0f : m / 127.0f;
}

static void write_f32_key(const float* k, int64_t d, uint8_t* head, int64_t slot) {
  float* keys = (float*)head + slot;
  for (int64_t i = 0; i < d; ++i) keys[i * block_tokens] = k[i];
}

static void write_f32_value(const float* v, int64_t d, uint8_t* values, const HeadLayout& h, int64_t slot) {
  for (int64_t i = 0; i < d; i += 16) {
    float* row = (float*)(values + i / 32 * h.panel) + slot * 32 + i % 32;
    store(row, load(v + i, d - i));
  }
}

static void write_int8(const float* k, const float* v, int64_t d, uint8_t* head, const HeadLayout& h, int64_t slot) {
  int8_t row[max_head_dim + 16];
  ((float*)(head + h.k_scale))[slot] = int8_row(k, d, row);
  for (int64_t i = 0; i < d; ++i) head[i * block_tokens + slot] = (uint8_t)row[i];
  ((float*)(head + h.v_scale))[slot] = int8_row(v, d, row);
  for (int64_t i = 0; i < d; ++i) head[h.v + i / 32 * h.panel + slot * 32 + i % 32] = (uint8_t)row[i];
}

static void write_bf16_key(const float* k, int64_t d, uint8_t* head, int64_t slot) {
  uint16_t row[max_head_dim + 16];
  bf16_row(k, d, row);
  for (int64_t i = 0; i < d; i += 2) memcpy(head + i / 2 * 128 + slot * 4, row + i, 4);
}

static void write_bf16_value(const float* v, int64_t d, uint8_t* values, const HeadLayout& h, int64_t slot) {
  uint16_t row[max_head_dim + 16];
  bf16_row(v, d, row);
  for (int64_t i = 0; i < d; ++i) memcpy(values + i / 32 * h.panel + slot / 2 * 128 + i % 32 * 4 + slot % 2 * 2, row + i, 2);
}

// Two tokens that form pairs of rows, slot even: whole registers at a time.
static void write_bf16_values(const float* v, const float* next, int64_t d, uint8_t* values, const HeadLayout& h,
                              int64_t slot) {
  uint16_t even[max_head_dim + 16], odd[max_head_dim + 16];
  bf16_row(v, d, even);
  bf16_row(next, d, odd);
  for (int64_t i = 0; i < d; i += 16)
    store_bytes(values + i / 32 * h.panel + slot / 2 * 128 + i % 32 * 4, pair_bf16(load_bf16(even + i), load_bf16(odd + i)));
}

static void kv_write(const KvLayout& l, const KvView& view, int64_t start, int64_t n, const float* k, int64_t k_stride,
                     const float* val, int64_t v_stride, int64_t h0, int64_t h1) {
  const HeadLayout layout = head_layout(l.type, l.head_dim);
  const int64_t d = l.head_dim;
  for (int64_t head = h0; head < h1; ++head) {
    for (int64_t t = 0; t < n; ++t) {
      const int64_t slot = (start + t) % block_tokens;
      uint8_t* at = kv_head_block(view, layout, head, (start + t) / block_tokens);
      const float* key = (const float*)((const char*)k + t * k_stride) + head * d;
      const float* value = (const float*)((const char*)val + t * v_stride) + head * d;
      if (l.type == DSO_KV_F32) {
        write_f32_key(key, d, at, slot);
        write_f32_value(value, d, at + layout.v, layout, slot);
      } else if (l.type == DSO_KV_INT8) {
        write_int8(key, value, d, at, layout, slot);
      } else if (l.type == DSO_KV_INT4) {
        write_int4_key(key, d, at, (float*)(at + layout.k_scale), slot);
        write_int4_value(value, d, at + layout.v, layout.panel, (float*)(at + layout.v_scale), slot);
      } else {
        write_bf16_key(key, d, at, slot);
        if (slot % 2 == 1 && t > 0) continue;  // written with its even neighbor
        if (slot % 2 == 0 && t + 1 < n)
          write_bf16_values(value, (const float*)((const char*)value + v_stride), d, at + layout.v, layout, slot);
        else
          write_bf16_value(value, d, at + layout.v, layout, slot);
      }
    }
  }
}

static void kv_read(const KvLayout& l, const KvView& view, int64_t tokens, float* key, float* value) {
  const HeadLayout layout = head_layout(l.type, l.head_dim);
  const int64_t d = l.head_dim;
  for (int64_t head = 0; head < l.kv_heads; ++head) {
    for (int64_t t = 0; t < tokens; ++t, key += d, value += d) {
      const int64_t slot = t % block_tokens;
      const uint8_t* at = kv_head_block(view, layout, head, t / block_tokens);
      if (l.type == DSO_KV_INT4) {
        read_int4_row(at + slot, block_tokens, d, ((const float*)(at + layout.k_scale))[slot], key);
        read_int4_value(at + layout.v, layout.panel, d, ((const float*)(at + layout.v_scale))[slot], slot, value);
        continue;
      }
      for (int64_t i = 0; i < d; ++i) {
        const uint8_t* panel = at + layout.v + i / 32 * layout.panel;
        const int64_t k = i * block_tokens + slot, v = slot * 32 + i % 32;  // as rows
        if (l.type == DSO_KV_F32) {
          key[i] = ((const float*)at)[k];
          value[i] = ((const float*)panel)[v];
        } else if (l.type == DSO_KV_INT8) {
          key[i] = (float)(int8_t)at[k] * ((const float*)(at + layout.k_scale))[slot];
          value[i] = (float)(int8_t)panel[v] * ((const float*)(at + layout.v_scale))[slot];
        } else {
          key[i] = from_bf16(((const uint16_t*)at)[i / 2 * 64 + slot * 2 + i % 2]);
          value[i] = from_bf16(((const uint16_t*)panel)[slot / 2 * 64 + i % 32 * 2 + slot % 2]);
        }
      }
    }
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
