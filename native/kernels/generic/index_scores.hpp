// The lightning indexer (DeepSeek-V3.2, section 2.1): a token's score is the sum over heads h of w_h relu(q_h . k).
//
// A key row is `index` elements, row-major. Lanes are heads: q of a row is stored in tiles of 16 heads, element after element,
// and keys are broadcast, so that no sum runs across lanes until the end: relu and the weights are applied lane by lane, in
// ascending order of tiles, and one horizontal sum gives the score. Every product is one chain over ascending elements: a
// score's bits depend only on q, w and the key, not on the requested range of tokens.
#pragma once
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace indexer {

enum class Keys { f32, bf16, dot };  // bf16: widened to fp32; dot: read by dot_bf16, with q also in bf16 pairs

constexpr int max_tokens = 4;                       // tokens per block of accumulators
constexpr int max_tiles = registers >= 32 ? 4 : 1;  // so that these, one tile row each and a broadcast fit into the registers

template <Keys K>
DSO_INLINE int64_t tile_bytes(int64_t index) {
  return index * lanes * (K == Keys::dot ? 2 : 4);
}

// total[t] += relu(q . k_t) * w over the heads of N tiles.
template <Keys K, int N>
static void add_heads(const uint8_t* q, const float* w, int64_t heads, const uint8_t* const* keys, int64_t index,
                      F (&total)[max_tokens]) {
  const int64_t tile = tile_bytes<K>(index);
  F acc[max_tokens][N];
#pragma GCC unroll 4
  for (int t = 0; t < max_tokens; ++t)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[t][n] = zero();
  if constexpr (K == Keys::dot) {
    for (int64_t i = 0; i < index; i += 2, q += 64) {
      B part[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) part[n] = load_bytes(q + n * tile);
#pragma GCC unroll 4
      for (int t = 0; t < max_tokens; ++t) {
        const B k = broadcast4(keys[t] + 2 * i);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[t][n] = dot_bf16(acc[t][n], part[n], k);
      }
    }
  } else if constexpr (K == Keys::bf16) {
    for (int64_t i = 0; i < index; i += 2, q += 128) {
      F even[N], odd[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        even[n] = load((const float*)(q + n * tile));
        odd[n] = load((const float*)(q + n * tile + 64));
      }
#pragma GCC unroll 4
      for (int t = 0; t < max_tokens; ++t) {
        const B k = broadcast4(keys[t] + 2 * i);
        const F k0 = even_bf16(k), k1 = odd_bf16(k);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[t][n] = fma(odd[n], k1, fma(even[n], k0, acc[t][n]));
      }
    }
  } else {
    for (int64_t i = 0; i < index; ++i, q += 64) {
      F part[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) part[n] = load((const float*)(q + n * tile));
#pragma GCC unroll 4
      for (int t = 0; t < max_tokens; ++t) {
        const F k = set(((const float*)keys[t])[i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[t][n] = fma(part[n], k, acc[t][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const F weight = load(w + n * lanes, heads - n * lanes);
#pragma GCC unroll 4
    for (int t = 0; t < max_tokens; ++t) total[t] = fma(max(zero(), acc[t][n]), weight, total[t]);  // NaN is preserved
  }
}

template <Keys K>
static void scores_of(const KvLayout& l, const KvView& v, int64_t heads, const uint8_t* q, const float* w, int64_t begin,
                      int64_t end, float scale, float* scores) {
  const int64_t row = l.index_bytes, tile = tile_bytes<K>(l.index), tiles = (heads + lanes - 1) / lanes;
  for (int64_t t = begin; t < end;) {
    const int64_t block = t / block_tokens, last = (block + 1) * block_tokens < end ? (block + 1) * block_tokens : end;
    const uint8_t* first = index_row(l, v, block * block_tokens);
    const uint8_t* next = last < end ? index_row(l, v, (block + 1) * block_tokens) : first;
    for (; t < last; t += max_tokens) {
      const int64_t slot = t % block_tokens, n = last - t < max_tokens ? last - t : max_tokens;
      const uint8_t* keys[max_tokens];  // the last one repeated if there are fewer
      for (int64_t i = 0; i < max_tokens; ++i) keys[i] = first + (slot + (i < n ? i : n - 1)) * row;
      for (int64_t i = 0; i < n * row; i += 64) __builtin_prefetch(next + slot * row + i);
      F total[max_tokens] = {zero(), zero(), zero(), zero()};
      int64_t i = 0;
      for (; i + max_tiles <= tiles; i += max_tiles)
        add_heads<K, max_tiles>(q + i * tile, w + i * lanes, heads - i * lanes, keys, l.index, total);
      for (; i < tiles; ++i) add_heads<K, 1>(q + i * tile, w + i * lanes, heads - i * lanes, keys, l.index, total);
      for (int64_t j = 0; j < n; ++j) {
        const float score = sum(total[j]) * scale;
        scores[t - begin + j] = score == score ? score : __builtin_inff();  // torch.topk also ranks NaN highest
      }
    }
    t = last;
  }
}
}  // namespace indexer

static constexpr int64_t index_query_bytes(int64_t heads, int64_t index) {
  return (heads + lanes - 1) / lanes * lanes * index * 4;
}

// [tiles][index][16 heads] fp32, or [tiles][index / 2][16 heads][2] bf16; heads past the last are zero.
static void index_query(const KvLayout& l, int64_t heads, const float* q, uint8_t* packed) {
  const int64_t index = l.index, tiles = (heads + lanes - 1) / lanes;
  const bool dot = l.type != DSO_KV_F32 && has_dot_bf16;
  const int64_t tile = dot ? indexer::tile_bytes<indexer::Keys::dot>(index) : indexer::tile_bytes<indexer::Keys::f32>(index);
  memset(packed + (tiles - 1) * tile, 0, tile);
  for (int64_t h = 0; h < heads; ++h, q += index) {
    uint8_t* out = packed + h / lanes * tile + h % lanes * 4;
    if (!dot) {
      for (int64_t i = 0; i < index; ++i) memcpy(out + i * 64, q + i, 4);
      continue;
    }
    for (int64_t i = 0; i < index; i += lanes) {
      uint16_t rounded[lanes];
      round_bf16(rounded, load(q + i, index - i));
      for (int64_t j = 0; j < lanes && i + j < index; j += 2) memcpy(out + (i + j) / 2 * 64, rounded + j, 4);
    }
  }
}

static void index_scores(const KvLayout& l, const KvView& v, int64_t heads, const uint8_t* q, const float* w, int64_t begin,
                         int64_t end, float scale, float* scores) {
  if (l.type == DSO_KV_F32)
    indexer::scores_of<indexer::Keys::f32>(l, v, heads, q, w, begin, end, scale, scores);
  else
    indexer::scores_of<has_dot_bf16 ? indexer::Keys::dot : indexer::Keys::bf16>(l, v, heads, q, w, begin, end, scale, scores);
}
}  // namespace dso::DSO_ISA_NAMESPACE
