// Attention without a cache, forward: online softmax (FlashAttention-2; Dao 2023, algorithm 1), transposed. Keys are rows and
// queries are lanes, so that largest logits, sums and factors are vectors over queries and nothing is reduced across lanes:
//   S^T = K Q^T,  P^T = 2^(S^T - m),  O^T = O^T * 2^(m_before - m) + V^T P^T.
#pragma once
#include "train_attention_pack.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

template <class Product>
struct ForwardRoom {
  static constexpr bool pairs = Product::pairs;
  static constexpr int64_t per = word<pairs>;

  Word *k, *v;         // K as rows; V transposed, block by block
  Word *rows, *q;      // for a block of queries: rows, columns
  Word* p;             // weights, interleaved
  float *s, *o, *out;  // logits, O^T, rows of the result
  float *m, *l, *factor;
  int64_t bytes;

  ForwardRoom(const TrainAttnTask& t, uint8_t* memory) {
    Room room{memory};
    const int64_t qk = padded(t.qk_width), vw = padded(t.v_width), blocks = blocks_of(t.bidirectional ? t.tokens : t.end);
    k = room.take<Word>(blocks * attn_block * qk / per);
    v = room.take<Word>(blocks * vw * attn_block / per);
    rows = room.take<Word>(attn_block * most(qk, vw) / per);
    q = room.take<Word>(attn_block * most(qk, vw) / per);
    p = room.take<Word>(attn_block * attn_block / per);
    s = room.take<float>(attn_block * attn_block);
    o = room.take<float>(vw * attn_block);
    out = room.take<float>(attn_block * vw);
    m = room.take<float>(attn_block);
    l = room.take<float>(attn_block);
    factor = room.take<float>(attn_block);
    bytes = room.used;
  }
  int64_t k_block(int64_t qk_width) const { return attn_block * padded(qk_width) / per; }
  int64_t v_block(int64_t v_width) const { return padded(v_width) * attn_block / per; }
};

// Computes the weights of a block of keys for 16 * C queries from `n` on, and the factors of m, l and O^T. Returns whether all
// factors are 1.
template <class Product, int C, class Mask>
DSO_INLINE bool softmax_columns(const ForwardRoom<Product>& r, F c, int64_t n, int64_t keys, int64_t key, int64_t query,
                                const Mask* mask) {
  bool same = true;
  F before[C], top[C][2], total[C][2];  // [columns][even, odd keys]: independent chains
#pragma GCC unroll 2
  for (int h = 0; h < C; ++h) before[h] = top[h][0] = top[h][1] = load(r.m + n + 16 * h);
  for (int64_t i = 0; i < keys; i += 2) {
#pragma GCC unroll 4
    for (int at = 0; at < 2 * C; ++at) {
      float* s = r.s + (i + at % 2) * attn_block + n + at / 2 * 16;
      F x = mul(load(s), c);
      if (mask) x = (*mask)(x, query + n + at / 2 * 16, key + i + at % 2);
      store(s, x);
      top[at / 2][at % 2] = max(x, top[at / 2][at % 2]);
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < C; ++h) {
    top[h][0] = max(top[h][0], top[h][1]);
    const F factor = exp2(sub(before[h], top[h][0]));
    total[h][0] = mul(load(r.l + n + 16 * h), factor);
    total[h][1] = zero();
    store(r.m + n + 16 * h, top[h][0]);
    store(r.factor + n + 16 * h, factor);
    same = same && at_least(factor, set(1.0f)) == 0xffff;
  }
  for (int64_t i = 0; i < keys; i += 2) {
#pragma GCC unroll 2
    for (int h = 0; h < C; ++h) {
      const int64_t place = i * attn_block + n + 16 * h;
      const F even = exp2(sub(load(r.s + place), top[h][0])), odd = exp2(sub(load(r.s + place + attn_block), top[h][0]));
      total[h][0] = add(total[h][0], even);
      total[h][1] = add(total[h][1], odd);
      if constexpr (Product::pairs) {
        store_bytes(r.p + i / 2 * attn_block + n + 16 * h, round_pair_bf16(even, odd));
      } else {
        store((float*)r.p + place, even);
        store((float*)r.p + place + attn_block, odd);
      }
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < C; ++h) store(r.l + n + 16 * h, add(total[h][0], total[h][1]));
  return same;
}

// The same for all queries of a part.
template <class Product, class Mask>
bool softmax_block(const ForwardRoom<Product>& r, float scale, const Part& part, int64_t key, int64_t query, const Mask* mask) {
  bool same = true;
  const F c = set(scale * log2e);
  int64_t n = part.begin;
  for (; n + 32 <= part.end; n += 32) same &= softmax_columns<Product, 2>(r, c, n, part.keys, key, query, mask);
  if (n < part.end) same &= softmax_columns<Product, 1>(r, c, n, part.keys, key, query, mask);
  return same;
}

template <class Product>
static void scale_columns(float* o, int64_t rows, const Part& part, const float* factor) {
  for (int64_t d = 0; d < rows; ++d, o += attn_block)
    for (int64_t n = part.begin; n < part.end; n += 16) store(o + n, mul(load(o + n), load(factor + n)));
}

// Writes rows [t, t + count) of the task's head from O^T.
template <class Number, class Product>
static void write_block(const TrainAttnTask& t, const ForwardRoom<Product>& r, int64_t head, int64_t query, int64_t count) {
  const int64_t wide = padded(t.v_width);
  turn_words((const Word*)r.o, attn_block, up(t.v_width, 16), up(count, 16), (Word*)r.out, wide);
  for (int64_t i = 0; i < count; ++i) {
    Number* to = t.o.template row<Number>(head, query + i);
    for (int64_t c = 0; c < t.v_width; c += 16) write16(to + c, div(load(r.out + i * wide + c), set(r.l[i])), t.v_width - c);
  }
  if (!t.largest) return;
  memcpy(t.largest + head * t.state_head + query, r.m, (size_t)count * 4);
  memcpy(t.sum + head * t.state_head + query, r.l, (size_t)count * 4);
}

template <class Number, class Product, class Mask>
static void attn_forward(const TrainAttnTask& t, uint8_t* memory) {
  constexpr bool pairs = Product::pairs;
  const ForwardRoom<Product> r(t, memory);
  Product product;
  const Mask mask(t);
  const int64_t first = mask.first_key_block(t.begin / attn_block), blocks = blocks_of(t.end);
  const int64_t line = padded(t.qk_width) / word<pairs>, depth = up(t.qk_width, Product::depth_step) / word<pairs>,
                out = up(t.v_width, Product::step);
  for (int64_t j = first; j <= mask.last_key_block(blocks - 1); ++j) {
    const int64_t at = j * attn_block, count = least(attn_block, t.tokens - at);
    pack_rows<Number, pairs>(t.k.template row<const Number>(0, at), t.k.token, count, t.qk_width,
                             r.k + j * r.k_block(t.qk_width));
    pack_rows<Number, pairs>(t.v.template row<const Number>(0, at), t.v.token, count, t.v_width, r.rows);
    pack_interleaved<pairs>(r.rows, count, t.v_width, r.q);
    pack_turned<pairs>(r.q, count, t.v_width, r.v + j * r.v_block(t.v_width));
  }
  for (int64_t head = 0; head < t.group; ++head)
    for (int64_t i = t.begin / attn_block; i < blocks; ++i) {
      const int64_t query = i * attn_block, count = least(attn_block, t.tokens - query), queries = up(count, Product::step);
      pack_rows<Number, pairs>(t.q.template row<const Number>(head, query), t.q.token, count, t.qk_width, r.rows);
      pack_columns<pairs>(r.rows, count, t.qk_width, r.q);
      for (int64_t n = 0; n < attn_block; n += 16) {
        store(r.m + n, set(-3e38f));  // finite, because -inf - -inf is NaN: for rows without a visible token so far
        store(r.l + n, zero());
      }
      const int64_t j0 = mask.first_key_block(i);
      for (int64_t j = j0; j <= mask.last_key_block(i); ++j) {
        const int64_t key = j * attn_block, keys = up(least(attn_block, t.tokens - key), Product::step),
                      step = mask.together(i, j);
        const Operand k = {r.k + j * r.k_block(t.qk_width), line},
                      v = {r.v + j * r.v_block(t.v_width), attn_block / word<pairs>};
        for (int64_t n = 0; n < queries; n += step) {
          const Part part = {n, least(n + step, queries), mask.reach(i, j, keys, n + step)};
          const int64_t width = part.end - n;
          product(k, part.keys, {r.q + n, attn_block}, width, depth, {r.s + n, attn_block, false});
          const bool same = softmax_block(r, t.scale, part, key, query, mask.needed(i, j) ? &mask : nullptr);
          if (!same && j > j0) scale_columns<Product>(r.o, out, part, r.factor);
          product(v, out, {r.p + n, attn_block}, width, part.keys / word<pairs>, {r.o + n, attn_block, j > j0});
        }
      }
      write_block<Number>(t, r, head, query, count);
    }
}
}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
