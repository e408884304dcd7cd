// The lightning indexer's scores on tile registers: 32 keys, a block of the cache, by two tiles of heads. The packed query of
// generic/index_scores.hpp is a B tile for every 32 elements, and keys are the rows of A tiles. relu, weights and the sum over
// heads are as there; products are added as TDPBF16PS does.
//
// Whole blocks are multiplied, whatever part of them is asked for: a key reaches its own row of C only.
//
// Caches in fp32, and keys whose number of elements is no multiple of 32, use vectors.
#pragma once
#include "../generic/index_scores.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace tiled {

// C of 32 keys: [2 x 16 keys][2 tiles of heads][16 keys][16 heads].
struct HeadProducts {
  alignas(64) float c[4][16][16];
};

// The products of the keys of a block with tile `two ? n and n + 1 : n` of heads.
static void key_products(Tiles& tiles, const uint8_t* keys, int64_t row, const uint8_t* q, int64_t q_tile, int64_t steps,
                         bool two, HeadProducts& out) {
  tiles.zero<0>(), tiles.zero<2>();
  if (two) tiles.zero<1>(), tiles.zero<3>();
  for (int64_t s = 0; s < steps; s++) {
    tiles.load<4>(keys + 64 * s, row);
    tiles.load<5>(keys + 16 * row + 64 * s, row);
    tiles.load<6>(q + 1024 * s, 64);
    tiles.dot_bf16<0, 4, 6>(), tiles.dot_bf16<2, 5, 6>();
    if (two) {
      tiles.load<7>(q + q_tile + 1024 * s, 64);
      tiles.dot_bf16<1, 4, 7>(), tiles.dot_bf16<3, 5, 7>();
    }
  }
  tiles.store<0>(out.c[0], 64), tiles.store<2>(out.c[2], 64);
  if (two) tiles.store<1>(out.c[1], 64), tiles.store<3>(out.c[3], 64);
}

static void index_scores(const KvLayout& l, const KvView& v, int64_t heads, const uint8_t* q, const float* w, int64_t begin,
                         int64_t end, float scale, float* scores) {
  if (l.type == DSO_KV_F32 || l.index % 32 != 0)
    return DSO_ISA_NAMESPACE::index_scores(l, v, heads, q, w, begin, end, scale, scores);
  const int64_t head_tiles = (heads + 15) / 16, q_tile = indexer::tile_bytes<indexer::Keys::dot>(l.index);
  Tiles tiles(64);
  tiles.shape(16, 16);
  HeadProducts products;
  for (int64_t block = begin / block_tokens; block * block_tokens < end; block++) {
    const int64_t first = block * block_tokens, from = begin > first ? begin - first : 0,
                  to = end - first < block_tokens ? end - first : block_tokens;
    F total[block_tokens];
    for (F& sum : total) sum = zero();
    for (int64_t n = 0; n < head_tiles; n += 2) {
      const bool two = n + 1 < head_tiles;
      key_products(tiles, index_row(l, v, first), l.index_bytes, q + n * q_tile, q_tile, l.index / 32, two, products);
      for (int64_t i = 0; i <= (int64_t)two; i++) {
        const F weight = load(w + (n + i) * 16, heads - (n + i) * 16);
        for (int64_t t = from; t < to; t++)
          total[t] = fma(max(zero(), load(products.c[t / 16 * 2 + i][t % 16])), weight, total[t]);  // NaN is preserved
      }
    }
    for (int64_t t = from; t < to; t++) {
      const float score = sum(total[t]) * scale;
      scores[first + t - begin] = score == score ? score : __builtin_inff();  // torch.topk also ranks NaN highest
    }
  }
}

}  // namespace tiled
}  // namespace dso::DSO_ISA_NAMESPACE
