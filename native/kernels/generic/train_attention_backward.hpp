// Attention for training, backward (FlashAttention-2; Dao 2023, algorithm 2), transposed like the forward. For a block of keys
// and all blocks of queries that see it, with weights recomputed from the rows' largest logits and sums:
//   P^T = 2^(K Q^T - m) / l,  dS^T = P^T * (V dO^T - delta),  delta = rowsum(dO * O),
//   dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T.
// A task sums over its query heads, and each sum has a fixed order.
#pragma once
#include "train_attention_pack.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

template <class Product>
struct BackwardRoom {
  static constexpr bool pairs = Product::pairs;
  static constexpr int64_t per = word<pairs>;

  int64_t qk, vw;                       // padded widths
  Word *k, *k_turned, *v;               // for the keys
  Word *q, *q_columns, *g, *g_columns;  // for a head's queries and gradients of results, interleaved and as columns
  Word* rows;                           // for one block
  float *m, *inverse, *delta;           // for the queries
  float *k_grad, *v_grad;
  float *s, *p_grad;        // for two blocks
  Word *p, *ds, *ds_pairs;  // P^T and dS^T as left operands, dS^T as right operand
  int64_t bytes;

  BackwardRoom(const TrainAttnTask& t, uint8_t* memory) : qk(padded(t.qk_width)), vw(padded(t.v_width)) {
    Room room{memory};
    const int64_t keys = blocks_of(t.end - t.begin) * attn_block, queries = blocks_of(t.tokens - t.begin) * attn_block,
                  tile = attn_block * attn_block;
    k = room.take<Word>(keys * qk / per);
    k_turned = room.take<Word>(keys * qk / per);
    v = room.take<Word>(keys * vw / per);
    q = room.take<Word>(queries * qk / per);
    q_columns = room.take<Word>(queries * qk / per);
    g = room.take<Word>(queries * vw / per);
    g_columns = room.take<Word>(queries * vw / per);
    rows = room.take<Word>(attn_block * most(qk, vw) / per);
    m = room.take<float>(queries);
    inverse = room.take<float>(queries);
    delta = room.take<float>(queries);
    k_grad = room.take<float>(keys * qk);
    v_grad = room.take<float>(keys * vw);
    s = room.take<float>(tile);
    p_grad = room.take<float>(tile);
    p = room.take<Word>(tile / per);
    ds = room.take<Word>(tile / per);
    ds_pairs = pairs ? room.take<Word>(tile / per) : ds;
    bytes = room.used;
  }
  int64_t qk_block() const { return attn_block * qk / per; }  // words
  int64_t v_block() const { return attn_block * vw / per; }
};

// S^T and V dO^T of two blocks to P^T and dS^T. key, query: the first ones, counted from the task's.
template <class Product>
static void softmax_gradient(const BackwardRoom<Product>& r, float scale, const Part& part, int64_t key, int64_t query,
                             const Mask* mask) {
  const F c = set(scale * log2e);
  for (int64_t n = part.begin; n < part.end; n += 16) {
    const F m = load(r.m + query + n), inverse = load(r.inverse + query + n), delta = load(r.delta + query + n);
    for (int64_t i = 0; i < part.keys; i += 2) {
      F p[2], ds[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int64_t place = (i + j) * attn_block + n;
        F x = mul(load(r.s + place), c);
        if (mask) x = (*mask)(x, query + n, key + i + j);
        p[j] = mul(exp2(sub(x, m)), inverse);
        ds[j] = mul(p[j], sub(load(r.p_grad + place), delta));
        if constexpr (Product::pairs) {
          round_bf16((uint16_t*)r.p + place, p[j]);
          round_bf16((uint16_t*)r.ds + place, ds[j]);
        } else {
          store((float*)r.p + place, p[j]);
          store((float*)r.ds + place, ds[j]);
        }
      }
      if constexpr (Product::pairs) store_bytes(r.ds_pairs + i / 2 * attn_block + n, round_pair_bf16(ds[0], ds[1]));
    }
  }
}

template <class Number, class Product>
static void pack_keys(const TrainAttnTask& t, const BackwardRoom<Product>& r) {
  constexpr bool pairs = Product::pairs;
  for (int64_t j = 0; j < blocks_of(t.end - t.begin); ++j) {
    const int64_t at = t.begin + j * attn_block, count = least(attn_block, t.tokens - at);
    pack_rows<Number, pairs>(t.k.template row<const Number>(0, at), t.k.token, count, t.qk_width, r.k + j * r.qk_block());
    pack_rows<Number, pairs>(t.v.template row<const Number>(0, at), t.v.token, count, t.v_width, r.v + j * r.v_block());
    pack_interleaved<pairs>(r.k + j * r.qk_block(), count, t.qk_width, r.q);
    pack_turned<pairs>(r.q, count, t.qk_width, r.k_turned + j * r.qk_block());
  }
}

// The queries of block i, counted from the task's first key, and their data.
template <class Number, class Product>
static void pack_queries(const TrainAttnTask& t, const BackwardRoom<Product>& r, int64_t head, int64_t i) {
  constexpr bool pairs = Product::pairs;
  const int64_t place = i * attn_block, at = t.begin + place, count = least(attn_block, t.tokens - at);
  pack_rows<Number, pairs>(t.q.template row<const Number>(head, at), t.q.token, count, t.qk_width, r.rows);
  pack_columns<pairs>(r.rows, count, t.qk_width, r.q_columns + i * r.qk_block());
  pack_interleaved<pairs>(r.rows, count, t.qk_width, r.q + i * r.qk_block());
  pack_rows<Number, pairs>(t.o_grad.template row<const Number>(head, at), t.o_grad.token, count, t.v_width, r.rows);
  pack_columns<pairs>(r.rows, count, t.v_width, r.g_columns + i * r.v_block());
  pack_interleaved<pairs>(r.rows, count, t.v_width, r.g + i * r.v_block());
  for (int64_t n = 0; n < count; ++n) {
    const Number *o = t.o.template row<const Number>(head, at + n), *g = t.o_grad.template row<const Number>(head, at + n);
    F total = zero();
    for (int64_t c = 0; c < t.v_width; c += 16) total = fma(read16(o + c, t.v_width - c), read16(g + c, t.v_width - c), total);
    r.delta[place + n] = sum(total);
    r.m[place + n] = t.largest[head * t.state_head + at + n];
    r.inverse[place + n] = 1.0f / t.sum[head * t.state_head + at + n];
  }
  for (int64_t n = count; n < padded(count); ++n) r.delta[place + n] = r.m[place + n] = r.inverse[place + n] = 0;
}

// Rows of fp32 sums, times factor.
template <class Number>
static void write_rows(const float* from, int64_t stride, int64_t count, int64_t width, float factor, Number* to,
                       int64_t to_stride) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += to_stride)
    for (int64_t c = 0; c < width; c += 16) write16(to + c, mul(load(from + c), set(factor)), width - c);
}

template <class Number, class Product>
static void attn_backward(const TrainAttnTask& t, uint8_t* memory) {
  constexpr bool pairs = Product::pairs;
  constexpr int64_t per = word<pairs>;
  const BackwardRoom<Product> r(t, memory);
  Product product;
  const Mask mask(t);
  const int64_t key_blocks = blocks_of(t.end - t.begin), query_blocks = blocks_of(t.tokens - t.begin);
  const int64_t qk_depth = up(t.qk_width, Product::depth_step) / per, v_depth = up(t.v_width, Product::depth_step) / per;
  const int64_t qk_out = up(t.qk_width, Product::step), v_out = up(t.v_width, Product::step), line = attn_block / per;
  pack_keys<Number>(t, r);
  for (int64_t head = 0; head < t.group; ++head) {
    const int64_t end = mask.last_query_block(key_blocks - 1, query_blocks) + 1;
    for (int64_t i = 0; i < end; ++i) pack_queries<Number>(t, r, head, i);
    int64_t begun = 0;  // blocks of queries whose gradient has its first summand
    for (int64_t j = 0; j < key_blocks; ++j) {
      const int64_t keys = padded(least(attn_block, t.tokens - t.begin - j * attn_block)),
                    last = mask.last_query_block(j, query_blocks);
      const Operand k = {r.k + j * r.qk_block(), r.qk / per}, k_turned = {r.k_turned + j * r.qk_block(), line},
                    v = {r.v + j * r.v_block(), r.vw / per};
      float *k_grad = r.k_grad + j * attn_block * r.qk, *v_grad = r.v_grad + j * attn_block * r.vw;
      for (int64_t i = j; i <= last; ++i) {
        const int64_t queries = padded(least(attn_block, t.tokens - t.begin - i * attn_block)), step = mask.together(i, j);
        const Operand q = {r.q + i * r.qk_block(), r.qk}, g = {r.g + i * r.v_block(), r.vw};
        const Word *q_columns = r.q_columns + i * r.qk_block(), *g_columns = r.g_columns + i * r.v_block();
        float* q_sums = t.q_sums + (head * query_blocks + i) * train_attn_query_grad(t.qk_width);
        bool more = head > 0 || i > j;
        for (int64_t n = (queries - 1) / step * step; n >= 0;
             n -= step, more = true) {  // the part that sees all keys comes first
          const Part part = {n, least(n + step, queries), mask.reach(i, j, keys, n + step)};
          const int64_t width = part.end - n, depth = width / per, row = n / per;
          product(k, part.keys, {q_columns + n, attn_block}, width, qk_depth, {r.s + n, attn_block, false});
          product(v, part.keys, {g_columns + n, attn_block}, width, v_depth, {r.p_grad + n, attn_block, false});
          softmax_gradient(r, t.scale, part, j * attn_block, i * attn_block, mask.needed(i, j) ? &mask : nullptr);
          product({r.p + row, line}, part.keys, {g.words + row * r.vw, r.vw}, v_out, depth, {v_grad, r.vw, more});
          product({r.ds + row, line}, part.keys, {q.words + row * r.qk, r.qk}, qk_out, depth, {k_grad, r.qk, more});
          product(k_turned, qk_out, {r.ds_pairs + n, attn_block}, width, part.keys / per, {q_sums + n, attn_block, i < begun});
        }
      }
      begun = most(begun, last + 1);
    }
  }
  const int64_t count = t.end - t.begin;
  write_rows(r.k_grad, r.qk, count, t.qk_width, t.scale, t.k_grad.template row<Number>(0, t.begin), t.k_grad.token);
  write_rows(r.v_grad, r.vw, count, t.v_width, 1.0f, t.v_grad.template row<Number>(0, t.begin), t.v_grad.token);
}

template <class Number>
static void query_grad_rows(const float* const* parts, int64_t part_count, int64_t count, int64_t width, float scale,
                            Number* out, int64_t out_token) {
  alignas(64) float sums[16 * attn_block], rows[attn_block * 16];
  for (int64_t c = 0; c < width; c += 16) {
    for (int64_t d = 0; d < 16; ++d) {
      int64_t n = 0;
      do {  // at least once: GCC warns of uninitialized sums otherwise
        const int64_t place = (c + d) * attn_block + n;
        F total = load(parts[0] + place);
        for (int64_t i = 1; i < part_count; ++i) total = add(total, load(parts[i] + place));
        store(sums + d * attn_block + n, total);
      } while ((n += 16) < count);
    }
    turn_words((const Word*)sums, attn_block, 16, up(count, 16), (Word*)rows, 16);
    write_rows(rows, 16, count, least(16, width - c), scale, out + c, out_token);
  }
}
static void query_grad(int32_t type, const float* const* parts, int64_t part_count, int64_t count, int64_t width, float scale,
                       void* out, int64_t out_token) {
  if (type == DSO_TYPE_BF16)
    query_grad_rows(parts, part_count, count, width, scale, (uint16_t*)out, out_token);
  else
    query_grad_rows(parts, part_count, count, width, scale, (float*)out, out_token);
}
}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
