// Multi-head latent attention, absorbed (DeepSeek-V2, section 2.1.2): all heads attend to the same rows of rank + rope
// elements, read directly from the cache, and the weighted sums are of their first rank elements. Up to 16 heads of one query
// row times a chunk of up to 256 tokens.
//
//   q K^T  lanes are heads, so softmax is vertical. q is packed [steps][16 heads], where a step is 4 bytes of a row: one fp32
//          element or two bf16 ones; a step of each token's row is broadcast. scale * log2(e) is part of q (attention.hpp).
//   p V    lanes are columns of the rows, 32 at a time; with bf16, two tokens' rows are paired in registers. Weights, rounded
//          to bf16 if the rows are, are broadcast: fp32 [tokens][16 heads], or bf16 [tokens / 2][16 heads][2].
//
// A row of q sees consecutive tokens of the chunk and is never multiplied by others: hidden tokens, even NaN, cannot reach it.
// Sums over a row's elements and over tokens have a fixed order per head, so no bit depends on other rows or heads.
#pragma once
#include "attention.hpp"  // log2e, minus_infinity
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace mla {

// The contents of a 4-byte step, and how two steps are multiplied and added.
struct Single {
  static constexpr int64_t depth = 1;
  DSO_INLINE F multiply(F acc, const uint8_t* across, const uint8_t* spread) {
    float x;
    memcpy(&x, spread, 4);
    return fma(load((const float*)across), set(x), acc);
  }
};
struct Pair {
  static constexpr int64_t depth = 2;
  DSO_INLINE F multiply(F acc, const uint8_t* across, const uint8_t* spread) {
    return dot_bf16(acc, load_bytes(across), broadcast4(spread));
  }
};

constexpr int tokens_wide = registers >= 32 ? 8 : 4;  // tokens whose logits are computed side by side,
constexpr int chains = registers >= 32 ? 2 : 1;       // each with several sums, to hide the latency of additions
constexpr int heads_wide = registers >= 32 ? 8 : 2;   // heads whose 32 columns are computed side by side
constexpr int64_t step_bytes = 64;                    // for 16 heads
constexpr int64_t line_steps = 16;                    // steps of a row per cache line

struct Scratch {
  alignas(64) float s[attn_chunk * mla_heads];         // logits, then weights if these are fp32
  alignas(64) uint8_t p[attn_chunk / 2 * step_bytes];  // weights in bf16
  const uint8_t* rows[attn_chunk + 2 * tokens_wide];   // of the tokens, then of `nothing`
  uint8_t* nothing;                                    // a row of zeros
};  // followed by that row, then INT8 and INT4 rows as bf16

DSO_INLINE int64_t width(const KvLayout& l) { return l.rank + l.rope; }
DSO_INLINE int64_t steps(const KvLayout& l) { return l.type == DSO_KV_F32 ? width(l) : width(l) / 2; }
DSO_INLINE int64_t room_bytes(const KvLayout& l) { return round_up(4 * steps(l) + 64, 64); }  // per row in scratch

// Logits [M tokens][16 heads]. Prefetches the M rows that follow.
template <class Step, int M>
static void logits(const uint8_t* q, const uint8_t* const* rows, int64_t n_steps, float* s) {
  const uint8_t* row[M];
  F acc[M][chains];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    row[m] = rows[m];
    for (int c = 0; c < chains; ++c) acc[m][c] = zero();
  }
  int64_t i = 0;
  for (; i + chains <= n_steps; i += chains) {
    if (i % line_steps == 0) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) __builtin_prefetch(rows[M + m] + 4 * i);
    }
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][c] = Step::multiply(acc[m][c], q + step_bytes * (i + c), row[m] + 4 * (i + c));
  }
  if (i < n_steps)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][0] = Step::multiply(acc[m][0], q + step_bytes * i, row[m] + 4 * i);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(s + m * mla_heads, chains == 2 ? add(acc[m][0], acc[m][chains - 1]) : acc[m][0]);
}

struct Softmax {
  F m, l;  // for 16 heads
};

// To the beginnings of the heads' parts, `stride` floats apart.
static void write_softmax(const Softmax& state, int64_t heads, float* part, int64_t stride) {
  float m[mla_heads], sum[mla_heads];
  store(m, state.m);
  store(sum, state.l);
  for (int64_t h = 0; h < heads; ++h) {
    part[h * stride] = m[h];
    part[h * stride + 1] = sum[h];
  }
}

// Converts logits of n tokens to weights 2^(logit - m): in place, or to pairs of bf16.
template <class Step>
DSO_INLINE Softmax weigh(float* s, int64_t n, uint8_t* p) {
  F m = set(minus_infinity());
  for (int64_t t = 0; t < n; ++t) m = max(m, load(s + t * mla_heads));
  const F base = less(m, set(-3.4028235e38f), zero(), m);  // -inf: 2^(-inf - 0) = 0, not 2^(-inf + inf)
  F even = zero(), odd = zero();
  for (int64_t t = 0; t < n; t += 2) {
    const F x = exp2(sub(load(s + t * mla_heads), base)),
            y = t + 1 < n ? exp2(sub(load(s + (t + 1) * mla_heads), base)) : zero();
    even = add(even, x);
    odd = add(odd, y);
    if constexpr (Step::depth == 2) {
      store_bytes(p + t / 2 * step_bytes, round_pair_bf16(x, y));
    } else {
      store(s + t * mla_heads, x);
      if (t + 1 < n) store(s + (t + 1) * mla_heads, y);
    }
  }
  return {m, add(even, odd)};
}

// 32 bf16 elements, of which n exist.
template <bool whole>
DSO_INLINE B numbers(const uint8_t* p, int64_t n) {
  if constexpr (whole) return load_bytes(p);
  alignas(64) uint8_t room[64] = {};
  memcpy(room, p, 2 * n);
  return load_bytes(room);
}

// Weighted sums of `n` columns (32 if whole) from `column` on, for H heads whose weights p points at.
template <class Step, int H, bool whole>
static void values(const uint8_t* p, const uint8_t* const* rows, const uint8_t* nothing, int64_t tokens, int64_t column,
                   int64_t n, F (&acc)[H][2]) {
#pragma GCC unroll 8
  for (int h = 0; h < H; ++h) acc[h][0] = acc[h][1] = zero();
  if constexpr (Step::depth == 2) {
    for (int64_t t = 0; t < tokens; t += 2, p += step_bytes) {
      const uint8_t *first = rows[t], *second = t + 1 < tokens ? rows[t + 1] : nothing;
      B x, y;
      pair_columns(numbers<whole>(first + 2 * column, n), numbers<whole>(second + 2 * column, n), x, y);
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const B weight = broadcast4(p + 4 * h);
        acc[h][0] = dot_bf16(acc[h][0], x, weight);
        acc[h][1] = dot_bf16(acc[h][1], y, weight);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h) in_columns(acc[h][0], acc[h][1]);
  } else {
    for (int64_t t = 0; t < tokens; ++t, p += step_bytes) {
      const float* row = (const float*)rows[t] + column;
      const F x = whole ? load(row) : load(row, n), y = whole ? load(row + 16) : n > 16 ? load(row + 16, n - 16) : zero();
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) {
        const F weight = set(((const float*)p)[h]);
        acc[h][0] = fma(x, weight, acc[h][0]);
        acc[h][1] = fma(y, weight, acc[h][1]);
      }
    }
  }
}

template <class Step>
static void attend(const KvLayout& l, const uint8_t* q, int64_t heads, const uint8_t* const* rows, int64_t seen, float* part,
                   Scratch& w) {
  const int64_t stride = l.rank + 16;
  for (int64_t t = 0; t < seen; t += tokens_wide) logits<Step, tokens_wide>(q, rows + t, steps(l), w.s + t * mla_heads);
  const Softmax state = weigh<Step>(w.s, seen, w.p);
  write_softmax(state, heads, part, stride);
  const uint8_t* p = Step::depth == 2 ? w.p : (const uint8_t*)w.s;
  for (int64_t column = 0; column < l.rank; column += 32)
    for (int64_t h0 = 0; h0 < heads; h0 += heads_wide) {
      const int64_t n = l.rank - column;
      F acc[heads_wide][2];
      if (n >= 32)
        values<Step, heads_wide, true>(p + 4 * h0, rows, w.nothing, seen, column, 32, acc);
      else
        values<Step, heads_wide, false>(p + 4 * h0, rows, w.nothing, seen, column, n, acc);
      float* out = part + h0 * stride + 16 + column;
      for (int64_t h = 0; h < heads_wide && h0 + h < heads; ++h, out += stride) {
        store(out, acc[h][0], n);
        if (n > 16) store(out + 16, acc[h][1], n - 16);
      }
    }
}
}  // namespace mla

static int64_t mla_scratch(const KvLayout& l) {
  return round_up(sizeof(mla::Scratch), 64) + mla::room_bytes(l) * (has_scales(l.type) ? 1 + attn_chunk : 1);
}

static int64_t mla_query_bytes(const KvLayout& l) { return mla::steps(l) * mla::step_bytes; }

static void mla_query(const KvLayout& l, const float* q, int64_t heads, float scale, uint8_t* packed) {
  const int64_t steps = mla::steps(l), width = mla::width(l), depth = width / steps;
  const F factor = set(scale * log2e);
  alignas(64) uint8_t block[mla_heads][64] = {};  // 16 steps per head
  float turned[mla_heads][latent_group];          // with INT4, a group of each head
  for (int64_t s = 0; s < steps; s += 16) {
    const int64_t group = s * depth / latent_group * latent_group;
    if (l.type == DSO_KV_INT4 && s * depth == group)
      for (int64_t h = 0; h < heads; ++h) latent_query_group(l, q + h * width, group, turned[h]);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t column = s * depth + 16 * i, n = width - column;
        const float* from = l.type == DSO_KV_INT4 ? turned[h] + column - group : q + h * width + column;
        const F x = n > 0 ? mul(load(from, n), factor) : zero();
        if (depth == 2)
          round_bf16(block[h] + 32 * i, x);
        else
          store((float*)block[h], x);
      }
    B x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = load_bytes(block[i]);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (s + i < steps) store_bytes(packed + (s + i) * mla::step_bytes, x[i]);
  }
}

static void mla_tokens(const KvLayout& l, const KvView& v, const int32_t* chosen, int64_t first, int64_t n, uint8_t* scratch) {
  mla::Scratch& w = *(mla::Scratch*)scratch;
  const int64_t room = mla::room_bytes(l);
  w.nothing = scratch + round_up(sizeof(mla::Scratch), 64);
  memset(w.nothing, 0, room);
  for (int64_t t = 0; t < n; ++t) w.rows[t] = latent_row(l, v, chosen ? chosen[t] : first + t);
  for (int64_t t = n; t < n + 2 * mla::tokens_wide; ++t) w.rows[t] = w.nothing;
  if (!has_scales(l.type)) return;
  for (int64_t t = 0; t < n; ++t) {
    const uint8_t* next = w.rows[t + mla::tokens_wide];
    if (t + mla::tokens_wide < n)
      for (int64_t i = 0; i < l.row_bytes; i += 64) __builtin_prefetch(next + i);
    uint8_t* row = w.nothing + (1 + t) * room;
    (l.type == DSO_KV_INT4 ? int4_latent_to_bf16 : int8_latent_to_bf16)(l, w.rows[t], row);
    w.rows[t] = row;
  }
}

static void mla_attend(const KvLayout& l, const uint8_t* packed, int64_t heads, int64_t begin, int64_t end, float* part,
                       uint8_t* scratch) {
  mla::Scratch& w = *(mla::Scratch*)scratch;
  if (begin >= end) {
    for (int64_t h = 0; h < heads; ++h, part += l.rank + 16) {
      memset(part, 0, 4 * (l.rank + 16));
      part[0] = minus_infinity();
    }
  } else if (l.type == DSO_KV_F32) {
    mla::attend<mla::Single>(l, packed, heads, w.rows + begin, end - begin, part, w);
  } else {
    mla::attend<mla::Pair>(l, packed, heads, w.rows + begin, end - begin, part, w);
    if (l.type == DSO_KV_INT4)
      for (int64_t h = 0; h < heads; ++h) finish_latent(l, part + h * (l.rank + 16) + 16);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
