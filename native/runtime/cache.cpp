#include "cache.hpp"

#include <cstring>

#include "error.hpp"
#include "layout.hpp"

namespace dso {

int64_t kv_layer_bytes(const Kernels& kernels, int32_t type, int64_t layers, int64_t kv_heads, int64_t head_dim) {
  if (type != DSO_KV_F32 && type != DSO_KV_BF16 && type != DSO_KV_INT8) fail(DSO_EINVAL, "cache: kv_type %d is unknown", type);
  if (layers < 1 || layers > 65536) fail(DSO_EINVAL, "cache: %lld layers", (long long)layers);
  if (kv_heads < 1 || kv_heads > 65536) fail(DSO_EINVAL, "cache: %lld kv_heads", (long long)kv_heads);
  if (!is_head_dim(head_dim)) fail(DSO_EINVAL, "cache: head_dim is %lld, and must be even and at most %d", (long long)head_dim, int(max_head_dim));
  return round_up(kernels.kv_layer_bytes(type, kv_heads, head_dim), 64);
}

namespace {
int64_t checked_bytes(int64_t blocks, int64_t block_bytes) {
  int64_t bytes;
  if (blocks < 1 || blocks > INT32_MAX) fail(DSO_EINVAL, "cache: %lld blocks", (long long)blocks);
  if (__builtin_mul_overflow(blocks, block_bytes, &bytes)) fail(DSO_ENOMEM, "cache: %lld blocks are too many", (long long)blocks);
  return bytes;
}
}  // namespace
}  // namespace dso

using namespace dso;

dso_cache::dso_cache(const Kernels& k, int32_t type, int32_t n_layers, int32_t kv_heads, int32_t head_dim, int64_t n_blocks)
    : kernels(k),
      layout{type, kv_heads, head_dim, kv_layer_bytes(kernels, type, n_layers, kv_heads, head_dim)},
      layers(n_layers),
      blocks(n_blocks),
      arena(checked_bytes(n_blocks, block_bytes())) {}

void dso_cache::copy_block(int64_t from, int64_t to) {
  if (from < 0 || from >= blocks || to < 0 || to >= blocks)
    fail(DSO_EINVAL, "cache: copy of block %lld to %lld, there are %lld", (long long)from, (long long)to, (long long)blocks);
  if (from != to) std::memcpy(arena.data() + to * block_bytes(), arena.data() + from * block_bytes(), block_bytes());
}

void dso_cache::release(int64_t from_block) {
  if (from_block < 0 || from_block > blocks)
    fail(DSO_EINVAL, "cache: release from block %lld, there are %lld", (long long)from_block, (long long)blocks);
  arena.release(from_block * block_bytes());
}

void dso_cache::read(int64_t layer, const int32_t* table, int64_t tokens, float* key, float* value) const {
  if (layer < 0 || layer >= layers) fail(DSO_EINVAL, "cache: layer %lld of %lld", (long long)layer, (long long)layers);
  if (tokens < 0) fail(DSO_EINVAL, "cache: %lld tokens", (long long)tokens);
  if (tokens == 0) return;
  if (!table || !key || !value) fail(DSO_EINVAL, "cache: block_table, key or value is NULL");
  for (int64_t b = 0; b < ceil_div(tokens, DSO_BLOCK_TOKENS); ++b)
    if (table[b] < 0 || table[b] >= blocks)
      fail(DSO_EINVAL, "cache: block_table[%lld] is %d, there are %lld blocks", (long long)b, table[b], (long long)blocks);
  kernels.kv_read(layout, view(layer, table), tokens, key, value);
}
