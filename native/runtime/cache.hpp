// The paged KV cache: `blocks` blocks in one range of address space, block-major (a block holds 32 tokens of every layer), so
// that whole blocks can be copied, shared and released. The layout within a layer is private to the kernels.
//
// Summaries are stored in a separate range, in groups of summary_blocks blocks: rows of 32 times 4 bytes, with one column per
// block. So the summaries of many blocks are read as a stream, and a group is returned to the system with its blocks.
#pragma once
#include <algorithm>

#include "arena.hpp"
#include "dso.h"
#include "kernels.hpp"

struct dso_cache {
  dso_cache(const dso::Kernels& kernels, const dso_cache_shape& shape, int64_t blocks);

  void copy_block(int64_t from, int64_t to);
  void release(int64_t from_block);
  int64_t saved_bytes() const { return block_bytes() + group_bytes() / dso::summary_blocks; }
  void save_block(int64_t block, uint8_t* bytes) const;
  void load_block(int64_t block, const uint8_t* bytes);
  void read(int64_t layer, const int32_t* table, int64_t tokens, float* key, float* value) const;

  int64_t block_bytes() const { return layers * layout.layer_bytes; }
  dso::KvView view(int64_t layer, const int32_t* table) const {
    return {arena.data() + layer * layout.layer_bytes, block_bytes(), table, summaries.data() + layer * layer_summaries(),
            group_bytes()};
  }
  int64_t group_bytes() const { return layers * layer_summaries(); }  // summaries of summary_blocks blocks; 0: none

  const dso::Kernels& kernels;  // the layout is the same on every ISA: each can read what another wrote
  const dso::KvLayout layout;
  const int64_t layers, blocks;
  dso::Arena arena, summaries;

 private:
  int64_t layer_summaries() const { return std::max(1, layout.kv_heads) * layout.summary_bytes; }
  uint8_t* summary(int64_t block) const;  // the first 4 bytes of its column; the next ones are kSummaryRow further
  void check_block(int64_t block) const;
};

namespace dso {
// Layout of one layer of a block. DSO_EINVAL for an invalid shape or type.
KvLayout checked_layout(const Kernels& kernels, const dso_cache_shape& shape);
// Bytes of all layers, including the block's share of the summaries.
int64_t cache_block_bytes(const Kernels& kernels, const dso_cache_shape& shape);
}  // namespace dso
