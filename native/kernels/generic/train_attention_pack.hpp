// A head's tokens in the layouts that the products of attention read. All rows are zero-padded to `padded` elements, blocks of
// tokens to multiples of 32.
//   rows        [token][width]              the left operand of products along the width
//   columns     [width word][token]         the right operand of these
//   interleaved [token word][width]         the right operand of products along the tokens
//   turned      [width][token word]         the left operand of these
#pragma once
#include "train_attention_product.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

constexpr int64_t attn_block = train_attn_block;
constexpr float log2e = 1.44269504f;

DSO_INLINE int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
DSO_INLINE int64_t padded(int64_t n) { return up(n, 32); }
DSO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
DSO_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
DSO_INLINE int64_t blocks_of(int64_t tokens) { return (tokens + attn_block - 1) / attn_block; }

template <bool pairs>
constexpr int64_t word = pairs ? 2 : 1;  // elements per word

DSO_INLINE F read16(const float* p) { return load(p); }
DSO_INLINE F read16(const uint16_t* p) { return load_bf16(p); }
DSO_INLINE F read16(const float* p, int64_t n) { return n >= 16 ? load(p) : load(p, n); }
DSO_INLINE F read16(const uint16_t* p, int64_t n) {  // the rest is zero
  if (n >= 16) return load_bf16(p);
  uint16_t some[16] = {};
  memcpy(some, p, (size_t)n * 2);
  return load_bf16(some);
}
DSO_INLINE void write16(float* p, F x, int64_t n) { store_some(p, x, n); }
DSO_INLINE void write16(uint16_t* p, F x, int64_t n) {
  if (n >= 16) return store_bf16(p, x);
  uint16_t some[16];
  store_bf16(some, x);
  memcpy(p, some, (size_t)n * 2);
}

// `count` tokens, at most a block.
template <class Number, bool pairs>
static void pack_rows(const Number* from, int64_t stride, int64_t count, int64_t width, Word* rows) {
  const int64_t wide = padded(width), line = wide / word<pairs>;
  for (int64_t t = 0; t < count; ++t, from += stride, rows += line) {
    if constexpr (pairs && sizeof(Number) == 4) {
      for (int64_t c = 0; c < wide; c += 16) store_bf16((uint16_t*)rows + c, c < width ? read16(from + c, width - c) : zero());
    } else if constexpr (pairs || sizeof(Number) == 4) {
      memcpy(rows, from, (size_t)width * sizeof(Number));
      memset((char*)rows + width * sizeof(Number), 0, (size_t)(wide - width) * sizeof(Number));
    } else {
      for (int64_t c = 0; c < wide; c += 16) store((float*)rows + c, c < width ? read16(from + c, width - c) : zero());
    }
  }
  memset(rows, 0, (size_t)((padded(count) - count) * line) * 4);
}

// Transposes words [rows][cols], multiples of 16, to [cols][rows].
static void turn_words(const Word* from, int64_t from_stride, int64_t rows, int64_t cols, Word* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < cols; c += 16) {
      B x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = load_bytes(from + (r + i) * from_stride + c);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store_bytes(to + (c + i) * to_stride + r, x[i]);
    }
}

// rows -> columns, whose rows are attn_block words.
template <bool pairs>
static void pack_columns(const Word* rows, int64_t count, int64_t width, Word* columns) {
  const int64_t line = padded(width) / word<pairs>;
  turn_words(rows, line, padded(count), line, columns, attn_block);
}

// rows -> interleaved, whose rows are padded(width) words. For fp32 they are the rows themselves.
template <bool pairs>
static void pack_interleaved(const Word* rows, int64_t count, int64_t width, Word* out) {
  const int64_t wide = padded(width);
  if constexpr (!pairs) {
    memcpy(out, rows, (size_t)(padded(count) * wide) * 4);
  } else {
    const uint16_t* from = (const uint16_t*)rows;
    for (int64_t t = 0; t < padded(count); t += 2, from += 2 * wide, out += wide)
      for (int64_t c = 0; c < wide; c += 16) store_bytes(out + c, pair_bf16(load_bf16(from + c), load_bf16(from + wide + c)));
  }
}

// interleaved -> turned, whose rows are attn_block tokens.
template <bool pairs>
static void pack_turned(const Word* interleaved, int64_t count, int64_t width, Word* turned) {
  turn_words(interleaved, padded(width), padded(count) / word<pairs>, padded(width), turned, attn_block / word<pairs>);
}

// Divides a task's memory into arrays, in floats; without memory it only counts.
struct Room {
  uint8_t* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* found = (T*)(memory + used);
    used += up(n * (int64_t)sizeof(T), 64);
    return found;
  }
};

struct Part {  // queries [begin, end) of a block, and the number of the block's keys that they may see; multiples of 16
  int64_t begin, end, keys;
};

// Which query lanes see a key, for blocks that need a mask: causal, and for encoders bidirectional.
struct Mask {
  explicit Mask(const TrainAttnTask& t) : window(t.window), end(t.end) {}

  int64_t window;
  int64_t end;  // one past the last key of all queries

  bool needed(int64_t query_block, int64_t key_block) const {
    return query_block == key_block || (window > 0 && (query_block - key_block + 1) * attn_block > window);
  }
  // Logits of 16 queries from `query` on for one key: -inf if it is hidden.
  F operator()(F x, int64_t query, int64_t key) const {
    return keep(x, key - query, window > 0 ? key + window - query : 16, set(-__builtin_inff()));
  }
  // Keys of a block that queries [begin, end) of a block may see.
  static int64_t reach(int64_t query_block, int64_t key_block, int64_t keys, int64_t end) {
    return query_block == key_block ? least(keys, end) : keys;
  }
  // Queries that are processed together: half a block on the diagonal, where the first half sees none of the last 32 keys.
  static int64_t together(int64_t query_block, int64_t key_block) {
    return query_block == key_block ? attn_block / 2 : attn_block;
  }
  int64_t first_key_block(int64_t query_block) const {
    return window > 0 ? most(0, query_block * attn_block - window + 1) / attn_block : 0;
  }
  int64_t last_query_block(int64_t key_block, int64_t blocks) const {
    return window > 0 ? least(blocks - 1, (key_block * attn_block + attn_block - 1 + window - 1) / attn_block) : blocks - 1;
  }
  int64_t last_key_block(int64_t query_block) const { return query_block; }
};

struct BidirectionalMask {
  explicit BidirectionalMask(const TrainAttnTask& t) : window(t.window), end(t.tokens) {}

  int64_t window;
  int64_t end;

  // Blocks with padding after the last key, and those that are not within the window of all queries of the block.
  bool needed(int64_t query_block, int64_t key_block) const {
    const int64_t apart = query_block < key_block ? key_block - query_block : query_block - key_block;
    return (key_block + 1) * attn_block > end || (window > 0 && (apart + 1) * attn_block > window + 1);
  }
  F operator()(F x, int64_t query, int64_t key) const {
    const F hidden = set(-__builtin_inff());
    if (key >= end) return hidden;
    return window > 0 ? keep(x, key - window - query, key + window + 1 - query, hidden) : x;
  }
  static int64_t reach(int64_t, int64_t, int64_t keys, int64_t) { return keys; }
  static int64_t together(int64_t, int64_t) { return attn_block; }
  int64_t first_key_block(int64_t query_block) const {
    return window > 0 ? most(0, query_block * attn_block - window) / attn_block : 0;
  }
  int64_t last_key_block(int64_t query_block) const {
    const int64_t last = (end - 1) / attn_block;
    return window > 0 ? least(last, (query_block * attn_block + attn_block - 1 + window) / attn_block) : last;
  }
};
}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
