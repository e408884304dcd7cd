// Attention of many queries over keys and values in ordinary tensors: the forward kernel of training, with as many keys as
// there are, and with the mask of the task. Products of bf16 tensors, and of rounded ones, are those of training in bf16.
#pragma once
#include "dense_attention.hpp"
#include "train_attention_forward.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

// A block of the mask in units of log 2, as rows of queries and turned to rows of keys.
struct TurnedMask {
  float *rows, *turned;

  explicit TurnedMask(Room& room)
      : rows(room.take<float>(attn_block * attn_block)), turned(room.take<float>(attn_block * attn_block)) {}

  template <class Number>
  void read(const DenseAttnTask& t, int64_t query, int64_t key) const {
    const int64_t queries = least(attn_block, t.queries - query), keys = least(attn_block, t.keys - key);
    const F hidden = set(-__builtin_inff());
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = (query + i) * t.mask_query + key;
      float* const to = rows + i * attn_block;
      for (int64_t c = 0; c < keys; c += 16) {
        const int64_t n = least(16, keys - c);
        if (t.mask_type == DSO_MASK_NUMBERS) {
          store(to + c, mask_logits(read16((const Number*)t.mask + at + c, n)));
        } else {
          uint8_t some[16] = {};
          memcpy(some, (const uint8_t*)t.mask + at + c, (size_t)n);
          store(to + c, less(zero(), to_float(load_u8(some)), zero(), hidden));
        }
      }
    }
    turn_words((const Word*)rows, attn_block, up(queries, 16), up(keys, 16), (Word*)turned, attn_block);
  }
};

// Logits of 16 queries for one key of a block: with the mask, and -inf if the key is hidden or behind the last one.
struct DenseMask {
  const float* turned;  // null: no mask
  int64_t keys;         // of the task
  int64_t later;        // causal: query i sees keys up to i + later; else a number that hides none

  F operator()(F x, int64_t query, int64_t key) const {
    const F hidden = set(-__builtin_inff());
    if (key >= keys) return hidden;
    if (turned) x = add(x, load(turned + key % attn_block * attn_block + query % attn_block));
    return keep(x, key - later - query, 16, hidden);
  }
};

static TrainAttnTask training_task(const DenseAttnTask& t) {
  TrainAttnTask task{};
  task.type = t.type;
  task.tokens = task.end = t.keys;
  task.qk_width = t.qk_width, task.v_width = t.v_width;
  task.bidirectional = true;
  task.o = {t.o, t.o_token, 0};
  return task;
}

template <class Product>
static int64_t dense_blocks_scratch(const DenseAttnTask& t) {
  Room room{nullptr};
  room.used = ForwardRoom<Product>(training_task(t), nullptr).bytes;
  TurnedMask mask(room);
  return room.used;
}

template <class Number, class Product>
static void dense_blocks(const DenseAttnTask& t, uint8_t* memory) {
  constexpr bool pairs = Product::pairs;
  const TrainAttnTask task = training_task(t);
  const ForwardRoom<Product> r(task, memory);
  Room room{memory, r.bytes};
  const TurnedMask mask(room);
  Product product;
  const bool causal = t.mask_type == DSO_MASK_CAUSAL, numbers = t.mask_type != DSO_MASK_NONE && !causal;
  const int64_t later = causal ? t.keys - t.queries : t.keys;
  const int64_t line = padded(t.qk_width) / word<pairs>, depth = up(t.qk_width, Product::depth_step) / word<pairs>,
                out = up(t.v_width, Product::step);
  for (int64_t j = 0; j < blocks_of(t.keys); ++j) {
    const int64_t at = j * attn_block, count = least(attn_block, t.keys - at);
    pack_rows<Number, pairs>((const Number*)t.k + at * t.k_token, t.k_token, count, t.qk_width,
                             r.k + j * r.k_block(t.qk_width));
    pack_rows<Number, pairs>((const Number*)t.v + at * t.v_token, t.v_token, count, t.v_width, r.rows);
    pack_interleaved<pairs>(r.rows, count, t.v_width, r.q);
    pack_turned<pairs>(r.q, count, t.v_width, r.v + j * r.v_block(t.v_width));
  }
  for (int64_t query = 0; query < t.queries; query += attn_block) {
    const int64_t count = least(attn_block, t.queries - query), queries = up(count, Product::step);
    pack_rows<Number, pairs>((const Number*)t.q + query * t.q_token, t.q_token, count, t.qk_width, r.rows);
    pack_columns<pairs>(r.rows, count, t.qk_width, r.q);
    for (int64_t n = 0; n < attn_block; n += 16) {
      store(r.m + n, set(lowest_logit));  // as in attn_forward, and no higher than any finite logit
      store(r.l + n, zero());
    }
    memset(r.o, 0, (size_t)(padded(t.v_width) * attn_block) * 4);
    const int64_t seen = least(t.keys, query + count + later);  // by any of these queries
    for (int64_t key = 0; key < seen; key += attn_block) {
      const int64_t j = key / attn_block, keys = up(least(attn_block, t.keys - key), Product::step);
      if (numbers) mask.read<Number>(t, query, key);
      const DenseMask one = {numbers ? mask.turned : nullptr, t.keys, later};
      const bool needed = numbers || key + attn_block > least(t.keys, query + later + 1);
      const Part part = {0, queries, keys};
      product({r.k + j * r.k_block(t.qk_width), line}, keys, {r.q, attn_block}, queries, depth, {r.s, attn_block, false});
      const bool same = softmax_block(r, t.scale, part, key, query, needed ? &one : nullptr);
      if (!same && key > 0) scale_columns<Product>(r.o, out, part, r.factor);
      product({r.v + j * r.v_block(t.v_width), attn_block / word<pairs>}, out, {r.p, attn_block}, queries, keys / word<pairs>,
              {r.o, attn_block, true});
    }
    // A query that sees nothing has sums of zeros, and 0 / 1 for a result.
    for (int64_t n = 0; n < attn_block; n += 16) store(r.l + n, less(zero(), load(r.l + n), load(r.l + n), set(1.0f)));
    write_block<Number>(task, r, 0, query, count);
  }
}

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
