// Attention by the textbook formula, in fp32: every score of the row, softmax, weighted sum. The reference for the fused
// families; one query head at a time and no online softmax.
#pragma once
#include "attention.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// One kv head of a layer, of whose tokens [first, end) are seen.
struct EagerTokens {
  const KvLayout& l;
  const KvView& v;
  int64_t kv_head, first, end;

  int64_t begin_block() const { return first / block_tokens; }
  int64_t end_block() const { return first < end ? round_up(end, block_tokens) / block_tokens : begin_block(); }
};

// The scores of the tokens, to scores[token], and -inf to the others of the first block. Returns the largest, or `top`, per
// lane.
template <Read T>
static F eager_scores(const EagerTokens& seen, const float* q, const Scores& how, F top, float* scores) {
  alignas(64) uint8_t room[block_room_bytes];
  const int64_t d = seen.l.head_dim;
  float turned[max_head_dim];
  if constexpr (transformed<T>) {
    memcpy(turned, q, d * 4);
    hadamard_inverse(turned, d);
    q = turned;
  }
  for (int64_t b = seen.begin_block(); b < seen.end_block(); ++b) {
    const Block block = visible_block<T>(seen.l, seen.v, seen.kv_head, b, {seen.first, seen.end}, room);
    for (int64_t c = 0; c < block_tokens; c += 16 * tile_cols) {
      F acc[1][1][tile_cols];
      for (int i = 0; i < tile_cols; ++i) acc[0][0][i] = zero();
      product<T, 1>(q, block.k + c * column_bytes<T>, d / row_depth<T>, 0, acc);
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t slot = c + 16 * i, t = b * block_tokens + slot;
        F x = mul(acc[0][0][i], set(how.scale));
        if (block.k_scale) x = mul(x, load(block.k_scale + slot));
        if (how.softcap > 0) x = capped(x, how.softcap);
        x = keep(x, seen.first - t, seen.end - t, set(minus_infinity()));
        top = max(top, x);
        if (t < seen.end) store(scores + t, x, seen.end - t);
      }
    }
  }
  return top;
}

// o += the sum of the tokens' values times weights[token] / total.
template <Read T>
static void eager_values(const EagerTokens& seen, const float* weights, F total, float* o) {
  alignas(64) uint8_t room[block_room_bytes];
  alignas(64) float weight[block_tokens];
  const int64_t d = seen.l.head_dim, panel_bytes = head_layout(seen.l.type, d).panel;
  float sums[max_head_dim];
  memset(sums, 0, d * 4);
  for (int64_t b = seen.begin_block(); b < seen.end_block(); ++b) {
    const Block block = visible_block<T>(seen.l, seen.v, seen.kv_head, b, {seen.first, seen.end}, room);
    for (int64_t slot = 0; slot < block_tokens; slot += 16) {
      const int64_t t = b * block_tokens + slot;
      F x = t < seen.end ? div(load(weights + t, seen.end - t), total) : zero();
      x = keep(x, seen.first - t, seen.end - t, zero());
      if (block.v_scale) x = mul(x, load(block.v_scale + slot));
      store(weight + slot, x);
    }
    for (int64_t column = 0; column < d; column += 16 * tile_cols) {
      F acc[1][1][tile_cols];
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t c = column + 16 * i;
        acc[0][0][i] = c < d ? load(sums + c, d - c) : zero();
      }
      product<T, 1>(weight, block.v + column / 32 * panel_bytes + column % 32 * column_bytes<T>, block_tokens / row_depth<T>, 0,
                    acc);
      for (int i = 0; i < tile_cols; ++i) {
        const int64_t c = column + 16 * i;
        if (c < d) store(sums + c, acc[0][0][i], d - c);
      }
    }
  }
  finish_output(seen.l, sums);
  for (int64_t c = 0; c < d; c += 16) store(o + c, add(load(o + c, d - c), load(sums + c, d - c)), d - c);
}

template <Read T>
struct Form {
  static constexpr Read read = T;
};
// Calls `call` with the form in which a cache's panels are read.
template <class Call>
DSO_INLINE void eager_form(int32_t type, Call call) {
  if (type == DSO_KV_F32)
    call(Form<Read::f32>{});
  else if (type == DSO_KV_BF16)
    call(Form<Read::bf16>{});
  else if (type == DSO_KV_INT8)
    call(Form<Read::i8>{});
  else
    call(Form<Read::i4>{});
}

static void attn_eager(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t n, int64_t first,
                       const Scores& how, const CacheCopy* copy, float* scores, float* o) {
  int64_t split = n;  // the first token that is read from the copy
  if (copy) split = n - copy->tokens > first ? n - copy->tokens : first;
  const EagerTokens older = {l, v, kv_head, first, split};
  F top = set(minus_infinity());
  if (copy) top = eager_scores<Read::i8>({copy->layout, copy->view, kv_head, split, n}, q, how, top, scores);
  eager_form(l.type, [&](auto form) { top = eager_scores<form.read>(older, q, how, top, scores); });

  if (how.sinks) top = max(top, set(how.sinks[0]));
  const float m = largest(top);
  F total = zero();
  for (int64_t t = first / block_tokens * block_tokens; t < n; t += 16) {
    const F x = keep(exp(sub(load(scores + t, n - t), set(m))), first - t, n - t, zero());
    total = add(total, x);
    store(scores + t, x, n - t);
  }
  const F sum_all = how.sinks ? add(set(sum(total)), exp(set(how.sinks[0] - m))) : set(sum(total));

  memset(o, 0, l.head_dim * 4);
  eager_form(l.type, [&](auto form) { eager_values<form.read>(older, scores, sum_all, o); });
  if (copy) eager_values<Read::i8>({copy->layout, copy->view, kv_head, split, n}, scores, sum_all, o);
}
}  // namespace dso::DSO_ISA_NAMESPACE
