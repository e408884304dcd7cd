// The paged KV cache: `blocks` blocks in one range of address space, block-major (a block holds 32 tokens of every layer of a
// group), so that whole blocks can be copied, shared and released. The layout within a layer is private to the kernels.
//
// Summaries are stored in a separate range, in groups of summary_blocks blocks: rows of 32 times 4 bytes, with one column per
// block. So the summaries of many blocks are read as a stream, and a group is returned to the system with its blocks.
#pragma once
#include <algorithm>
#include <vector>

#include "arena.hpp"
#include "dso.h"
#include "kernels.hpp"

namespace dso {
struct CacheLayer {
  KvLayout layout;
  int64_t at, summaries_at;  // offsets in bytes within a block, and within a group of summaries
  int32_t group;
};
}  // namespace dso

struct dso_cache {
  dso_cache(const dso::Kernels& kernels, const dso_cache_shape& shape, int64_t blocks);

  void copy_block(int64_t from, int64_t to);
  void release(int64_t from_block);
  int64_t saved_bytes() const { return block_bytes() + group_bytes() / dso::summary_blocks; }
  void save_block(int64_t block, uint8_t* bytes) const;
  void load_block(int64_t block, const uint8_t* bytes);
  // Reads the layer itself, not its copy.
  void read(int64_t layer, const int32_t* table, int64_t tokens, float* key, float* value) const;

  int64_t block_bytes() const { return end.at; }
  int64_t group_bytes() const { return end.summaries_at; }  // summaries of summary_blocks blocks; 0: none
  int32_t groups() const { return end.group; }
  int32_t group(int64_t layer) const { return places[layer].group; }
  const dso::KvLayout& layout(int64_t layer) const { return places[layer].layout; }
  // The copy of a layer's newest tokens, as a layer of its own, if newest is not 0.
  int64_t copy_of(int64_t layer) const { return layers + layer; }
  // table: that of the layer's group.
  dso::KvView view(int64_t layer, const int32_t* table) const {
    const dso::CacheLayer& place = places[layer];
    return {arena.data() + place.at, block_bytes(), table, summaries.data() + place.summaries_at, group_bytes()};
  }

  const dso::Kernels& kernels;                // the layout is the same on every ISA: each can read what another wrote
  const std::vector<dso::CacheLayer> places;  // one per layer, then one per copy
  const dso::CacheLayer end;                  // sizes of the largest group, and the number of groups
  const int64_t layers, blocks, newest;       // newest: tokens that are read from the copies; 0: there are none
  dso::Arena arena, summaries;
  bool interleaved = false;  // over the memory nodes of a plan that used it

 private:
  uint8_t* summary(int64_t block) const;  // the first 4 bytes of its column; the next ones are kSummaryRow further
  void check_block(int64_t block) const;
};

namespace dso {
// Layout of each layer, then of each copy, and its place in a block of its group. DSO_EINVAL for an invalid shape, type or
// group.
std::vector<CacheLayer> checked_layers(const Kernels& kernels, const dso_cache_shape& shape);
// Sizes of the largest group, and the number of groups.
CacheLayer end_of(const std::vector<CacheLayer>& places);
// Bytes of a block, including its share of the summaries.
int64_t cache_block_bytes(const Kernels& kernels, const dso_cache_shape& shape);
}  // namespace dso
