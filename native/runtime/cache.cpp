#include "cache.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"
#include "layout.hpp"

namespace dso {
namespace {
KvLayout latent_layout(const dso_cache_shape& s) {
  auto even = [](const char* name, int64_t n, int64_t least) {
    if (n < least || n > (1 << 16) || n % 2)
      fail(DSO_EINVAL, "cache: %s is %lld, must be even and from %lld to 65536", name, (long long)n, (long long)least);
  };
  if (s.kv_heads != 0 || s.head_dim != 0)
    fail(DSO_EINVAL, "cache: kv_heads is %d and head_dim %d, must be 0 with rank %d", s.kv_heads, s.head_dim, s.rank);
  even("rank", s.rank, 2);
  even("rope", s.rope, 2);
  even("index", s.index, 0);
  const int64_t row = latent_row_bytes(s.kv_type, s.rank, s.rope), index = index_row_bytes(s.kv_type, s.index);
  return {s.kv_type, 0,
          0,         round_up(DSO_BLOCK_TOKENS * (row + index), 64),
          s.rank,    s.rope,
          s.index,   row,
          index,     s.summaries ? summary_bytes(s.kv_type, s.rank + s.rope) : 0};
}

// row: {elements, tokens that share a row, whether it is stored as kv_type}
KvLayout rows_layout(const dso_cache_shape& s, const int32_t* row) {
  if (row[0] < 2 || row[0] > 65536 || row[0] % 2)
    fail(DSO_EINVAL, "cache: a row of %d elements, must be even and from 2 to 65536", row[0]);
  if (row[1] < 1 || row[1] > 65536) fail(DSO_EINVAL, "cache: %d tokens share a row, must be from 1 to 65536", row[1]);
  KvLayout l{};
  l.type = row[2] || s.kv_type == DSO_KV_F32 ? s.kv_type : int32_t(DSO_KV_BF16);
  l.rank = row[0];
  l.every = row[1];
  l.row_bytes = latent_row_bytes(l.type, l.rank, 0);
  l.layer_bytes = round_up(((DSO_BLOCK_TOKENS - 1) / l.every + 1) * l.row_bytes, 64);
  return l;
}

KvLayout heads_layout(const Kernels& kernels, const dso_cache_shape& s, int32_t kv_heads, int32_t head_dim) {
  if (kv_heads < 1 || kv_heads > 65536) fail(DSO_EINVAL, "cache: %d kv_heads, must be from 1 to 65536", kv_heads);
  if (!is_head_dim(head_dim))
    fail(DSO_EINVAL, "cache: head_dim is %d, must be even and at most %d", head_dim, int(max_head_dim));
  return {s.kv_type, kv_heads,
          head_dim,  round_up(kernels.kv_layer_bytes(s.kv_type, kv_heads, head_dim), 64),
          0,         0,
          0,         0,
          0,         s.summaries ? summary_bytes(s.kv_type, head_dim) : 0};
}

KvLayout layout_of(const Kernels& kernels, const dso_cache_shape& s, int32_t layer) {
  if (s.rows) {
    if (s.kv_heads || s.head_dim || s.rank || s.rope || s.index || s.summaries || s.newest || s.heads)
      fail(DSO_EINVAL, "cache: the fields of other kinds of caches must be 0 with rows");
    return rows_layout(s, s.rows + 3 * layer);
  }
  if (s.rank != 0 || s.rope != 0 || s.index != 0) {
    if (s.heads) fail(DSO_EINVAL, "cache: heads must be NULL with rank %d", s.rank);
    return latent_layout(s);
  }
  if (!s.heads) return heads_layout(kernels, s, s.kv_heads, s.head_dim);
  if (s.kv_heads != 0 || s.head_dim != 0)
    fail(DSO_EINVAL, "cache: kv_heads is %d and head_dim %d, must be 0 with heads per layer", s.kv_heads, s.head_dim);
  return heads_layout(kernels, s, s.heads[2 * layer], s.heads[2 * layer + 1]);
}

void check_copies(const dso_cache_shape& s) {
  if (s.newest < 0) fail(DSO_EINVAL, "cache: newest is %d, must not be negative", s.newest);
  if ((s.newest > 0) != (s.newest_groups != nullptr))
    fail(DSO_EINVAL, "cache: newest is %d, and newest_groups is %s", s.newest, s.newest_groups ? "not NULL" : "NULL");
  if (s.newest > 0 && (s.rank != 0 || s.summaries))
    fail(DSO_EINVAL, "cache: newest is %d, must be 0 with latents and with summaries", s.newest);
  const int32_t last = s.groups ? *std::max_element(s.groups, s.groups + s.layers) : 0;  // of the layers' groups
  for (int32_t i = 0; s.newest > 0 && i < s.layers; ++i)
    if (s.newest_groups[i] <= last)
      fail(DSO_EINVAL, "cache: the copy of layer %d is in group %d, must be above %d", i, s.newest_groups[i], last);
}

// The place behind a layer, without a layout.
CacheLayer after(const CacheLayer& p) {
  return {{}, p.at + p.layout.layer_bytes, p.summaries_at + std::max(1, p.layout.kv_heads) * p.layout.summary_bytes, p.group};
}
}  // namespace

std::vector<CacheLayer> checked_layers(const Kernels& kernels, const dso_cache_shape& s) {
  if (s.kv_type < DSO_KV_F32 || s.kv_type > DSO_KV_INT4) fail(DSO_EINVAL, "cache: kv_type %d is unknown", s.kv_type);
  if (s.layers < 1 || s.layers > 65536) fail(DSO_EINVAL, "cache: %d layers, must be from 1 to 65536", s.layers);
  if (s.summaries != 0 && s.summaries != 1) fail(DSO_EINVAL, "cache: summaries is %d, must be 0 or 1", s.summaries);
  check_copies(s);
  std::vector<CacheLayer> layers, next;  // next: by group, the place after its last layer
  const auto add = [&](const dso_cache_shape& shape, const int32_t* groups, int32_t i) {
    const int32_t group = groups ? groups[i] : 0;
    if (group < 0 || group >= (s.newest > 0 ? 2 : 1) * s.layers)
      fail(DSO_EINVAL, "cache: layer %d is in group %d of %d layers", i, group, s.layers);
    for (int32_t g = int32_t(next.size()); g <= group; ++g) next.push_back({{}, 0, 0, g});
    CacheLayer& place = next[size_t(group)];
    place.layout = layout_of(kernels, shape, i);
    layers.push_back(place);
    place = after(place);
  };
  for (int32_t i = 0; i < s.layers; ++i) add(s, s.groups, i);
  dso_cache_shape copies = s;
  copies.kv_type = DSO_KV_INT8;
  for (int32_t i = 0; s.newest > 0 && i < s.layers; ++i) add(copies, s.newest_groups, i);
  for (const CacheLayer& n : next)
    if (n.at == 0) fail(DSO_EINVAL, "cache: no layer is in group %d of %d", n.group, int(next.size()));
  if (s.summaries && next.size() > 1)
    fail(DSO_EINVAL, "cache: summaries need all layers in one group, there are %d groups", int(next.size()));
  return layers;
}

CacheLayer end_of(const std::vector<CacheLayer>& places) {
  CacheLayer end{};
  for (const CacheLayer& p : places) {
    const CacheLayer next = after(p);
    end = {{}, std::max(end.at, next.at), std::max(end.summaries_at, next.summaries_at), std::max(end.group, p.group + 1)};
  }
  return end;
}

int64_t cache_block_bytes(const Kernels& kernels, const dso_cache_shape& s) {
  const CacheLayer end = end_of(checked_layers(kernels, s));
  return end.at + end.summaries_at / summary_blocks;
}

namespace {
constexpr int64_t kSummaryRow = 4 * summary_blocks;
}  // namespace
}  // namespace dso

using namespace dso;

dso_cache::dso_cache(const Kernels& k, const dso_cache_shape& shape, int64_t n_blocks)
    : kernels(k),
      places(checked_layers(kernels, shape)),
      end(end_of(places)),
      layers(shape.layers),
      blocks(n_blocks),
      newest(shape.newest),
      arena(bytes_of_parts("cache", "blocks", n_blocks, block_bytes())),
      summaries(ceil_div(n_blocks, summary_blocks) * group_bytes()) {}

uint8_t* dso_cache::summary(int64_t block) const {
  return summaries.data() + block / summary_blocks * group_bytes() + block % summary_blocks * 4;
}

void dso_cache::copy_block(int64_t from, int64_t to) {
  if (from < 0 || from >= blocks || to < 0 || to >= blocks)
    fail(DSO_EINVAL, "cache: cannot copy block %lld to %lld, there are %lld blocks", (long long)from, (long long)to,
         (long long)blocks);
  if (from == to) return;
  std::memcpy(arena.data() + to * block_bytes(), arena.data() + from * block_bytes(), block_bytes());
  for (int64_t at = 0; at < group_bytes(); at += kSummaryRow) std::memcpy(summary(to) + at, summary(from) + at, 4);
}

void dso_cache::release(int64_t from_block) {
  if (from_block < 0 || from_block > blocks)
    fail(DSO_EINVAL, "cache: cannot release from block %lld, there are %lld blocks", (long long)from_block, (long long)blocks);
  arena.release(from_block * block_bytes());
  summaries.release(ceil_div(from_block, summary_blocks) * group_bytes());
}

void dso_cache::check_block(int64_t block) const {
  if (block < 0 || block >= blocks)
    fail(DSO_EINVAL, "cache: block %lld does not exist, there are %lld blocks", (long long)block, (long long)blocks);
}

void dso_cache::save_block(int64_t block, uint8_t* bytes) const {
  check_block(block);
  std::memcpy(bytes, arena.data() + block * block_bytes(), block_bytes());
  bytes += block_bytes();
  for (int64_t at = 0; at < group_bytes(); at += kSummaryRow, bytes += 4) std::memcpy(bytes, summary(block) + at, 4);
}

void dso_cache::load_block(int64_t block, const uint8_t* bytes) {
  check_block(block);
  std::memcpy(arena.data() + block * block_bytes(), bytes, block_bytes());
  bytes += block_bytes();
  for (int64_t at = 0; at < group_bytes(); at += kSummaryRow, bytes += 4) std::memcpy(summary(block) + at, bytes, 4);
}

void dso_cache::read(int64_t layer, const int32_t* table, int64_t tokens, float* key, float* value) const {
  if (layer < 0 || layer >= layers)
    fail(DSO_EINVAL, "cache: layer %lld does not exist, there are %lld layers", (long long)layer, (long long)layers);
  if (tokens < 0) fail(DSO_EINVAL, "cache: %lld tokens, must not be negative", (long long)tokens);
  if (tokens == 0) return;
  if (!table || !key || (!value && !layout(layer).rank)) fail(DSO_EINVAL, "cache: block_table, key or value is NULL");
  for (int64_t b = 0; b < ceil_div(tokens, DSO_BLOCK_TOKENS); ++b)
    if (table[b] < 0 || table[b] >= blocks)
      fail(DSO_EINVAL, "cache: block_table[%lld] is %d, there are %lld blocks", (long long)b, table[b], (long long)blocks);
  const KvLayout& l = layout(layer);
  if (l.every > 1) {  // one row at a time
    for (int64_t t = l.every - 1; t < tokens; t += l.every, key += l.rank) {
      KvView one = view(layer, table + t / DSO_BLOCK_TOKENS);
      one.base += t % DSO_BLOCK_TOKENS / l.every * l.row_bytes;
      kernels.latent_read(l, one, 1, key, nullptr);
    }
    return;
  }
  (l.rank ? kernels.latent_read : kernels.kv_read)(l, view(layer, table), tokens, key, value);
}
