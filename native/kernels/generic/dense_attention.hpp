// Attention of a few queries over keys and values in ordinary tensors. Everything is fp32 after loading; per query, one row of
// logits, its softmax, and one pass over the values.
#pragma once
#include "train_attention_pack.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

// Numbers of a mask in units of log 2. Finite ones stay finite: where the mask hides all keys of a query by the lowest number
// of its type, their logits are equal, and the result is the mean of the values, as that of torch.
constexpr float lowest_logit = -__FLT_MAX__;
DSO_INLINE F mask_logits(F x) { return less(x, set(lowest_logit), x, max(set(lowest_logit), mul(x, set(log2e)))); }

struct DenseRoom {
  float *q, *s, *o;  // a query times the scale, its logits, its result; each padded to whole vectors
  int64_t bytes;

  DenseRoom(const DenseAttnTask& t, uint8_t* memory) {
    Room room{memory};
    q = room.take<float>(up(t.qk_width, 16));
    s = room.take<float>(up(t.keys, 16));
    o = room.take<float>(up(t.v_width, 16));
    bytes = room.used;
  }
};

// s[t] = q . k_t in units of log 2, for keys [0, t.keys).
template <class Number>
static void dense_logits(const DenseAttnTask& t, const float* q, float* s) {
  constexpr int64_t kTogether = 4;  // keys: independent chains
  const Number* k = (const Number*)t.k;
  for (int64_t i = 0; i < t.keys; i += kTogether) {
    const int64_t count = least(kTogether, t.keys - i);
    F total[kTogether] = {zero(), zero(), zero(), zero()};
    const Number* rows[kTogether];
    for (int64_t j = 0; j < kTogether; ++j) rows[j] = k + (i + least(j, count - 1)) * t.k_token;
    for (int64_t c = 0; c < t.qk_width; c += 16) {
      const F x = load(q + c);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kTogether; ++j) total[j] = fma(x, read16(rows[j] + c, t.qk_width - c), total[j]);
    }
    for (int64_t j = 0; j < count; ++j) s[i + j] = sum(total[j]);
  }
}

template <class Number>
static void dense_mask(const DenseAttnTask& t, int64_t query, float* s) {
  if (t.mask_type == DSO_MASK_CAUSAL) {
    for (int64_t i = query + 1 + t.keys - t.queries; i < t.keys; ++i) s[i] = -__builtin_inff();
    return;
  }
  const F hidden = set(-__builtin_inff());
  for (int64_t i = 0; i < t.keys; i += 16) {
    const int64_t n = least(16, t.keys - i);
    F x = load(s + i, n);
    if (t.mask_type == DSO_MASK_NUMBERS) {
      x = add(x, mask_logits(read16((const Number*)t.mask + query * t.mask_query + i, n)));
    } else {
      uint8_t some[16] = {};
      memcpy(some, (const uint8_t*)t.mask + query * t.mask_query + i, (size_t)n);
      x = less(zero(), to_float(load_u8(some)), x, hidden);
    }
    store(s + i, x, n);
  }
}

// Replaces logits by their weights 2^(s - largest), and returns 1 / the sum of these; 0 if all are hidden.
static float dense_softmax(float* s, int64_t n) {
  F top = set(-__builtin_inff());
  for (int64_t i = 0; i < n; i += 16) top = max(keep(load(s + i, n - i), 0, n - i, top), top);
  const float most_of_all = largest(top);
  if (most_of_all == -__builtin_inff()) return 0.0f;
  F total = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F p = keep(exp2(sub(load(s + i, n - i), set(most_of_all))), 0, n - i, zero());
    total = add(total, p);
    store(s + i, p, n - i);
  }
  return 1.0f / sum(total);
}

// o = factor * sum over t of s[t] v_t.
template <class Number>
static void dense_values(const DenseAttnTask& t, const float* s, float factor, float* o) {
  constexpr int64_t kVectors = 4;  // of the result at a time
  for (int64_t c = 0; c < t.v_width; c += 16 * kVectors) {
    F total[kVectors] = {zero(), zero(), zero(), zero()};
    const Number* v = (const Number*)t.v + c;
    const int64_t n = t.v_width - c;
    if (n >= 16 * kVectors) {
      for (int64_t i = 0; i < t.keys; ++i, v += t.v_token) {
        const F p = set(s[i]);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) total[j] = fma(p, read16(v + 16 * j), total[j]);
      }
    } else {
      for (int64_t i = 0; i < t.keys; ++i, v += t.v_token)
        for (int64_t j = 0; 16 * j < n; ++j) total[j] = fma(set(s[i]), read16(v + 16 * j, n - 16 * j), total[j]);
    }
    for (int64_t j = 0; j < kVectors && 16 * j < n; ++j) store(o + c + 16 * j, mul(total[j], set(factor)));
  }
}

template <class Number>
static void dense_attention(const DenseAttnTask& t, uint8_t* memory) {
  const DenseRoom r(t, memory);
  for (int64_t i = 0; i < t.queries; ++i) {
    const Number* q = (const Number*)t.q + i * t.q_token;
    for (int64_t c = 0; c < t.qk_width; c += 16) store(r.q + c, mul(read16(q + c, t.qk_width - c), set(t.scale * log2e)));
    dense_logits<Number>(t, r.q, r.s);
    if (t.mask_type != DSO_MASK_NONE) dense_mask<Number>(t, i, r.s);
    const float factor = dense_softmax(r.s, t.keys);
    Number* o = (Number*)t.o + i * t.o_token;
    if (factor == 0.0f) {
      memset(o, 0, (size_t)t.v_width * sizeof(Number));
      continue;
    }
    dense_values<Number>(t, r.s, factor, r.o);
    for (int64_t c = 0; c < t.v_width; c += 16) write16(o + c, load(r.o + c), t.v_width - c);
  }
}

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
