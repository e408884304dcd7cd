// Attention by the textbook formula, in fp32: every score of the row, softmax, weighted sum. The reference for the fused
// families; one query head at a time and no online softmax.
#pragma once
#include "attention.hpp"

namespace dso::DSO_ISA_NAMESPACE {

template <Read T>
static void eager(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t n, int64_t first,
                  const Scores& how, float* scores, float* o) {
  alignas(64) uint8_t room[block_room_bytes];
  alignas(64) float weight[block_tokens];
  const int64_t d = l.head_dim, panel_bytes = head_layout(l.type, d).panel;
  const int64_t begin = first / block_tokens, end = round_up(n, block_tokens) / block_tokens;
  float turned[max_head_dim];
  if constexpr (transformed<T>) {
    memcpy(turned, q, d * 4);
    hadamard_inverse(turned, d);
    q = turned;
  }

  F top = set(minus_infinity());
  for (int64_t b = begin; b < end; ++b) {
    const Block block = visible_block<T>(l, v, kv_head, b, {first, n}, room);
    for (int64_t c = 0; c < block_tokens; c += 16 * tile_cols) {
      F acc[1][1][tile_cols];
      for (int i = 0; i < tile_cols; ++i) acc[0][0][i] = zero();
      product<T, 1>(q, block.k + c * column_bytes<T>, d / row_depth<T>, 0, acc);
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t slot = c + 16 * i, t = b * block_tokens + slot;
        F x = mul(acc[0][0][i], set(how.scale));
        if (block.k_scale) x = mul(x, load(block.k_scale + slot));
        if (how.softcap > 0) x = capped(x, how.softcap);
        x = keep(x, first - t, n - t, set(minus_infinity()));
        top = max(top, x);
        if (t < n) store(scores + t, x, n - t);
      }
    }
  }

  if (how.sinks) top = max(top, set(how.sinks[0]));
  const float m = largest(top);
  F total = zero();
  for (int64_t t = begin * block_tokens; t < n; t += 16) {
    const F x = keep(exp(sub(load(scores + t, n - t), set(m))), first - t, n - t, zero());
    total = add(total, x);
    store(scores + t, x, n - t);
  }
  const F sum_all = how.sinks ? add(set(sum(total)), exp(set(how.sinks[0] - m))) : set(sum(total));

  memset(o, 0, d * 4);
  for (int64_t b = begin; b < end; ++b) {
    const Block block = visible_block<T>(l, v, kv_head, b, {first, n}, room);
    for (int64_t slot = 0; slot < block_tokens; slot += 16) {
      const int64_t t = b * block_tokens + slot;
      F x = t < n ? div(load(scores + t, n - t), sum_all) : zero();
      if (block.v_scale) x = mul(x, load(block.v_scale + slot));
      store(weight + slot, x);
    }
    for (int64_t column = 0; column < d; column += 16 * tile_cols) {
      F acc[1][1][tile_cols];
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t c = column + 16 * i;
        acc[0][0][i] = c < d ? load(o + c, d - c) : zero();
      }
      product<T, 1>(weight, block.v + column / 32 * panel_bytes + column % 32 * column_bytes<T>, block_tokens / row_depth<T>, 0,
                    acc);
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t c = column + 16 * i;
        if (c < d) store(o + c, acc[0][0][i], d - c);
      }
    }
  }
  finish_output(l, o);
}

static void attn_eager(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t n, int64_t first,
                       const Scores& scores, float* row, float* o) {
  if (l.type == DSO_KV_F32)
    eager<Read::f32>(l, v, kv_head, q, n, first, scores, row, o);
  else if (l.type == DSO_KV_BF16)
    eager<Read::bf16>(l, v, kv_head, q, n, first, scores, row, o);
  else if (l.type == DSO_KV_INT8)
    eager<Read::i8>(l, v, kv_head, q, n, first, scores, row, o);
  else
    eager<Read::i4>(l, v, kv_head, q, n, first, scores, row, o);
}
}  // namespace dso::DSO_ISA_NAMESPACE
