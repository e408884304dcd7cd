// The lightning indexer's keys, and its choice: the tokens with the largest scores (index_scores.hpp).
#pragma once
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace indexer {

// Integers in the order of floats: key(a) < key(b) if a < b; consecutive floats have consecutive keys.
DSO_INLINE uint32_t key_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
DSO_INLINE float of_key(uint32_t key) {
  const uint32_t u = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &u, 4);
  return x;
}

static int64_t count_from(const float* x, int64_t n, float least) {  // number of elements that are at least `least`
  const F bound = set(least);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += lanes)
    count += __builtin_popcount(at_least(load(x + i, n - i), bound) & (n - i < lanes ? (1u << (n - i)) - 1 : 0xffffu));
  return count;
}
}  // namespace indexer

static void index_write(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* k, int64_t k_stride) {
  for (int64_t t = start; t < start + n; ++t, k = (const float*)((const char*)k + k_stride)) {
    uint8_t* row = index_row(l, v, t);
    if (l.type == DSO_KV_F32)
      memcpy(row, k, l.index * 4);
    else
      write_bf16(k, l.index, row);
  }
}

// Finds the k-th largest by bisection of the range of floats between the smallest and the largest, each time counting the
// scores that are at least the midpoint: at most 32 passes, about 17 for 32,768 scores, because a count of exactly k ends it.
static void index_select(const float* scores, int64_t n, int64_t k, float* chosen) {
  using namespace indexer;
  F low = set(scores[0]), high = low;
  for (int64_t i = 0; i < n; i += lanes) {
    const F x = keep(load(scores + i, n - i), 0, n - i, low);
    low = min(low, x);
    high = max(high, x);
  }
  // Invariant: at least k are >= lo, fewer than k are >= hi. A maximum of -0 counts as 0, which it equals.
  uint32_t lo = key_of(-largest(sub(zero(), low))), hi = key_of(largest(high) + 0.0f) + 1;
  int64_t above = 0;  // number of elements >= hi
  while (hi - lo > 1) {
    const uint32_t middle = lo + (hi - lo) / 2;
    const int64_t count = count_from(scores, n, of_key(middle));
    if (count == k) {  // exactly these
      hi = middle;
      above = k;
      break;
    }
    if (count > k)
      lo = middle;
    else {
      hi = middle;
      above = count;
    }
  }
  const F sure = set(of_key(hi)), bound = set(of_key(lo));
  for (int64_t i = 0, ties = k - above; i < n; i += lanes) {
    const uint32_t there = n - i < lanes ? (1u << (n - i)) - 1 : 0xffffu;
    const F x = load(scores + i, n - i);
    uint32_t take = at_least(x, sure) & there;
    if (ties > 0) {
      uint32_t equal = at_least(x, bound) & there & ~take;
      for (; equal && ties > 0; equal &= equal - 1, --ties) take |= equal & -equal;  // the first ones
    }
    for (; take; take &= take - 1) *chosen++ = (float)(i + __builtin_ctz(take));
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
