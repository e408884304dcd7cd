#include "cache_rotate.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "error.hpp"
#include "layout.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kTokens = DSO_BLOCK_TOKENS;

void check_rotation(const char* name, const dso_rotation& r, int64_t width) {
  if (r.rot < 2 || r.rot % 2 || r.offset < 0 || int64_t(r.offset) + r.rot > width)
    fail(DSO_EINVAL, "%s: elements [%d, %lld) of %lld cannot be rotated in pairs", name, r.offset, (long long)r.offset + r.rot,
         (long long)width);
  if (r.flags & ~DSO_FLAG_INTERLEAVED) fail(DSO_EINVAL, "%s: flags are %d, only INTERLEAVED is supported", name, r.flags);
  if (!r.inv_freq) fail(DSO_EINVAL, "%s: inv_freq is NULL", name);
  for (int64_t i = 0; i < r.rot / 2; ++i)
    if (!std::isfinite(r.inv_freq[i]))
      fail(DSO_EINVAL, "%s: inv_freq[%lld] is %g, must be finite", name, (long long)i, double(r.inv_freq[i]));
}

void check_blocks(const dso_cache& cache, const int32_t* table, int64_t blocks) {
  if (!table) fail(DSO_EINVAL, "cache: block_table is NULL");
  for (int64_t b = 0; b < blocks; ++b)
    if (table[b] < 0 || table[b] >= cache.blocks)
      fail(DSO_EINVAL, "cache: block_table[%lld] is %d, there are %lld blocks", (long long)b, table[b],
           (long long)cache.blocks);
  std::vector<int32_t> sorted(table, table + blocks);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) fail(DSO_EINVAL, "cache: block %d occurs twice in block_table and would be rotated twice", *twice);
}

// Cosines and sines for a block's tokens: element n of token t (cosines first) goes to out[n * per_number + t * per_token].
void fill(const dso_rotation& r, int64_t position, int64_t delta, int64_t per_number, int64_t per_token, float* out) {
  const int64_t half = r.rot / 2;
  for (int64_t t = 0; t < kTokens; ++t) {
    const float now = float(position + t), then = float(position + t + delta);
    for (int64_t i = 0; i < half; ++i) {
      const float made = now * r.inv_freq[i], wanted = then * r.inv_freq[i];
      const double angle = double(wanted) - double(made);
      out[i * per_number + t * per_token] = float(std::cos(angle));
      out[(half + i) * per_number + t * per_token] = float(std::sin(angle));
    }
  }
}

Rotation rotation_of(const dso_rotation& r, const float* table) {
  return {table, r.rot, r.offset, (r.flags & DSO_FLAG_INTERLEAVED) != 0};
}

}  // namespace

void turn(Context& c, dso_cache& cache, const dso_rotation& key, const dso_rotation* index, int32_t group, const int32_t* table,
          int64_t tokens, int64_t position, int64_t delta) {
  if (cache.layout(0).every) fail(DSO_EINVAL, "cache: rows of compressed attention cannot be moved");
  if (group < 0 || group >= cache.groups())
    fail(DSO_EINVAL, "cache: group %d does not exist, there are %d groups", group, cache.groups());
  const bool latent = cache.layout(0).rank;
  const int64_t layers = int64_t(cache.places.size());
  for (int64_t layer = 0; layer < layers; ++layer) {
    const KvLayout& layout = cache.layout(layer);
    check_rotation("key", key, latent ? layout.rope : layout.head_dim);
    if (!index != !layout.index)
      fail(DSO_EINVAL, "cache: index is %s, but the cache's index keys have %d elements", index ? "given" : "NULL",
           layout.index);
    if (index) check_rotation("index", *index, layout.index);
  }
  if (tokens < 0) fail(DSO_EINVAL, "cache: %lld tokens, must not be negative", (long long)tokens);
  const int64_t blocks = ceil_div(tokens, kTokens), first = std::min(position, position + delta),
                last = std::max(position, position + delta) + tokens;
  if (first < 0 || last > INT32_MAX)
    fail(DSO_EINVAL, "cache: %lld tokens from position %lld cannot move by %lld", (long long)tokens, (long long)position,
         (long long)delta);
  if (blocks == 0) return;
  check_blocks(cache, table, blocks);
  if (delta == 0) return;  // the keys would not change, but INT8 would be rounded again

  const int64_t key_room = kTokens * key.rot, index_room = index ? kTokens * index->rot : 0,
                room = std::max(latent ? cache.layout(0).rope : 0, index ? index->rot : 0);
  const int64_t each = round_up(key_room + index_room + room, 16);
  std::vector<float> rooms(static_cast<size_t>(each * c.pool.threads()));
  parallel(c, blocks, [&](int64_t block, int thread) {
    float* key_table = rooms.data() + thread * each;
    float* index_table = key_table + key_room;
    const int64_t at = position + block * kTokens;
    if (latent) {
      fill(key, at, delta, 1, key.rot, key_table);
      if (index) fill(*index, at, delta, 1, index->rot, index_table);
    } else {
      fill(key, at, delta, kTokens, 1, key_table);
    }
    const Rotation turn = rotation_of(key, key_table), index_turn = index ? rotation_of(*index, index_table) : Rotation{};
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (cache.group(layer) != group) continue;
      const KvLayout& layout = cache.layout(layer);
      const KvView view = cache.view(layer, table);
      if (latent)
        c.kernels.latent_rotate(layout, view, block, turn, index ? &index_turn : nullptr, index_table + index_room);
      else
        c.kernels.kv_rotate(layout, view, block, turn);
      if (layout.summary_bytes > 0) (latent ? c.kernels.latent_summarize : c.kernels.kv_summarize)(layout, view, block);
    }
  });
}

}  // namespace dso
