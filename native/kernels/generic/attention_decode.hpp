// The decode family: one chunk of 256 tokens per task, so that a single sequence keeps every thread busy, then a merge in
// order. The heads of a group, and the rows of drafts, share each load from the cache: reading it dominates the time.
#pragma once
#include "attention.hpp"

namespace dso::DSO_ISA_NAMESPACE {

static bool any_nan(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16)
    if (any_nan(load(x + i, n - i))) return true;
  return false;
}

static void attn_decode_chunk(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride,
                              int64_t group, int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight,
                              const Scores& scores, int64_t chunk, float* part, uint8_t* scratch) {
  Workspace& w = *(Workspace*)scratch;
  const int64_t d = l.head_dim, stride = d + 16, count = (r1 - r0) * group;
  constexpr int64_t most = 64;  // number of rows and heads whose m and l fit on the stack
  if (count > most && r1 - r0 > 1) {
    const int64_t half = r0 + (r1 - r0) / 2;
    attn_decode_chunk(l, v, kv_head, q, q_stride, group, r0, half, ctx, sight, scores, chunk, part, scratch);
    attn_decode_chunk(l, v, kv_head, q, q_stride, group, half, r1, ctx, sight, scores, chunk,
                      part + (half - r0) * group * stride, scratch);
    return;
  }
  for (int64_t h0 = 0; h0 < group; h0 += most) {
    const int64_t heads = group - h0 < most ? group - h0 : most, rows = (r1 - r0) * heads;  // heads < group: one row
    float m[most], sum[most];
    float* out = part + h0 * stride;
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = minus_infinity();
      sum[i] = 0;
      memset(out + i * stride, 0, stride * 4);
    }
    const QueryRows task = {q + h0 * d, q_stride, heads, r0, r1, ctx, sight, scores};
    const auto output = [=](int64_t i) { return out + i * stride + 16; };
    attend_cache(l, v, kv_head, task, chunk, m, sum, output, w);
    for (int64_t i = 0; i < rows; ++i) {
      out[i * stride] = m[i];
      out[i * stride + 1] = sum[i];
      finish_output(l, output(i));
    }
  }
  // 0 * NaN: a row may have met a NaN or infinity of a token that only later rows see. Recomputed alone, it does not.
  if (r1 - r0 > 1)
    for (int64_t i = 0; i < count; ++i)
      if (any_nan(part + i * stride + 16, d)) {
        for (int64_t r = r0; r < r1; ++r)
          attn_decode_chunk(l, v, kv_head, q, q_stride, group, r, r + 1, ctx, sight, scores, chunk,
                            part + (r - r0) * group * stride, scratch);
        return;
      }
}

// Sums of o and l over chunks, each times 2^(m - top); chunks without visible tokens have m = -inf and weight 0. Up to 64
// columns at a time: the weights are the same for all.
template <int N>
DSO_INLINE F merge_columns(const float* part, int64_t part_stride, int64_t chunks, float top, int64_t column, int64_t columns,
                           F (&o)[N]) {
  F l = zero();
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) o[n] = zero();
  for (int64_t c = 0; c < chunks; ++c) {
    const float* p = part + c * part_stride;
    const F weight = exp2(set(p[0] - top));
    l = fma(weight, set(p[1]), l);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) o[n] = fma(weight, load(p + 16 + column + 16 * n, columns - 16 * n), o[n]);
  }
  return l;
}

// Stores columns [column, column + columns) of the sums: divided by the sum of weights, or, for a part, undivided after m and
// l.
template <int N, bool whole>
DSO_INLINE void merged(const float* part, int64_t part_stride, int64_t chunks, float top, int64_t column, int64_t columns,
                       const float* sink, float* out) {
  F o[N];
  F l = merge_columns<N>(part, part_stride, chunks, top, column, columns, o);
  if (sink) l = add(l, exp2(set(*sink * log2e - top)));
  if constexpr (!whole) {
    float sums[16];
    store(sums, l);
    out[1] = sums[0];
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) store(out + (whole ? 0 : 16) + column + 16 * n, whole ? div(o[n], l) : o[n], columns - 16 * n);
}

template <bool whole>
static void merge_parts(const float* part, int64_t part_stride, int64_t chunks, int64_t head_dim, const float* sink,
                        float* out) {
  float top = sink ? *sink * log2e : minus_infinity();
  for (int64_t c = 0; c < chunks; ++c)
    if (part[c * part_stride] > top) top = part[c * part_stride];
  if (!whole) out[0] = top;
  if (top == minus_infinity()) top = 0;
  int64_t i = 0;
  for (; i + 64 <= head_dim; i += 64) merged<4, whole>(part, part_stride, chunks, top, i, 64, sink, out);
  for (; i < head_dim; i += 16) merged<1, whole>(part, part_stride, chunks, top, i, head_dim - i, sink, out);
}

static void attn_merge(const float* part, int64_t part_stride, int64_t chunks, int64_t head_dim, const float* sink,
                       float* out) {
  merge_parts<true>(part, part_stride, chunks, head_dim, sink, out);
}
static void attn_fold(const float* part, int64_t part_stride, int64_t chunks, int64_t head_dim, float* out) {
  merge_parts<false>(part, part_stride, chunks, head_dim, nullptr, out);
}
}  // namespace dso::DSO_ISA_NAMESPACE
