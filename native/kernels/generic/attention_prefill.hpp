// The prefill family: up to attn_rows rows of a sequence and all their heads against the cache, chunk after chunk, with online
// softmax.
#pragma once
#include "attention.hpp"
#include "attention_decode.hpp"  // any_nan for a row

namespace dso::DSO_ISA_NAMESPACE {

constexpr int64_t state_rows = 512;  // rows and heads per task

struct PrefillScratch {
  Workspace work;
  float m[state_rows], l[state_rows];
};

constexpr size_t attn_scratch_bytes = (sizeof(PrefillScratch) + 63) / 64 * 64;

static void attn_prefill(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride, int64_t group,
                         int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight, const Scores& scores,
                         const CacheCopy* copy, float* o, int64_t o_stride, uint8_t* scratch) {
  PrefillScratch& s = *(PrefillScratch*)scratch;
  const int64_t d = l.head_dim, count = (r1 - r0) * group;
  if (count > state_rows) {  // a large group: fewer rows, then fewer heads at once
    const int64_t half = r0 + (r1 - r0) / 2, heads = group / 2;
    if (r1 - r0 > 1) {
      attn_prefill(l, v, kv_head, q, q_stride, group, r0, half, ctx, sight, scores, copy, o, o_stride, scratch);
      attn_prefill(l, v, kv_head, q, q_stride, group, half, r1, ctx, sight, scores, copy, o, o_stride, scratch);
    } else {
      attn_prefill(l, v, kv_head, q, q_stride, heads, r0, r1, ctx, sight, scores, copy, o, o_stride, scratch);
      Scores rest = scores;
      if (rest.sinks) rest.sinks += heads;
      attn_prefill(l, v, kv_head, q + heads * d, q_stride, group - heads, r0, r1, ctx, sight, rest, copy, o + heads * d,
                   o_stride, scratch);
    }
    return;
  }
  const auto output = [=](int64_t i) { return (float*)((char*)o + (r0 + i / group) * o_stride) + i % group * d; };
  for (int64_t i = 0; i < count; ++i) {
    s.m[i] = scores.sinks ? scores.sinks[i % group] * log2e : minus_infinity();
    s.l[i] = scores.sinks ? 1 : 0;
    memset(output(i), 0, d * 4);
  }
  QueryRows rows = {q, q_stride, group, r0, r1, ctx, sight, scores};
  const auto attend_all = [&](const KvLayout& layout, const KvView& view) {
    for (int64_t chunk = next_chunk(rows, -1); chunk >= 0; chunk = next_chunk(rows, chunk))
      attend_cache(layout, view, kv_head, rows, chunk, s.m, s.l, output, s.work);
    for (int64_t i = 0; i < count; ++i) finish_output(layout, output(i));
  };
  if (copy) rows.sight.newest = copy->tokens;
  attend_all(l, v);
  if (copy) {
    rows.sight.copied = true;
    attend_all(copy->layout, copy->view);
  }
  bool poisoned = false;
  for (int64_t i = 0; i < count; ++i) {
    float* out = output(i);
    for (int64_t c = 0; c < d; c += 16) store(out + c, div(load(out + c, d - c), set(s.l[i])), d - c);
    poisoned = poisoned || any_nan(out, d);
  }
  // 0 * NaN: a row may have met a NaN or infinity of a token that only later rows see. Recomputed alone, it does not.
  if (poisoned && r1 - r0 > 1)
    for (int64_t r = r0; r < r1; ++r)
      attn_prefill(l, v, kv_head, q, q_stride, group, r, r + 1, ctx, sight, scores, copy, o, o_stride, scratch);
}
}  // namespace dso::DSO_ISA_NAMESPACE
