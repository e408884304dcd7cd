// Entries of compressed attention on every variant, against double; and where the cache holds them.
#include <algorithm>
#include <cmath>
#include <set>

#include "cache.hpp"
#include "entry_places.hpp"
#include "scalar_kernels.hpp"
// After scalar_kernels.hpp, whose names layout.hpp also defines.
#include "plan_parts.hpp"

static void entries(const Variant& v, int type, int64_t width, int64_t every, bool overlap, Random& random) {
  const int64_t series = overlap ? 2 : 1, cols = 2 * series * width, tokens = 3 * every;
  const int32_t rows[] = {(int32_t)cols, 1, 0};
  dso_cache_shape shape{};
  shape.kv_type = type;
  shape.layers = 1;
  shape.rows = rows;
  const KvLayout layout = checked_layers(*v.kernels, shape)[0].layout;
  check(layout.type == (type == DSO_KV_F32 ? DSO_KV_F32 : DSO_KV_BF16), "rows are stored as type %d", layout.type);
  Buffer memory((size_t)((tokens + 31) / 32 * layout.layer_bytes), 0xff);
  std::vector<int32_t> table((size_t)(tokens + 31) / 32);
  for (size_t i = 0; i < table.size(); ++i) table[i] = (int32_t)i;
  random.shuffle(table);
  const KvView view{memory.get(), layout.layer_bytes, table.data()};
  std::vector<float> x = normal((size_t)(tokens * cols), 2, random);
  const std::vector<float> bias = normal((size_t)(every * series * width), 1, random);
  v.kernels->latent_write(layout, view, 0, tokens, x.data(), 4 * cols);
  if (type != DSO_KV_F32)
    for (float& e : x) e = rounded_bf16(e);
  for (int64_t entry = 0; entry < 3; ++entry) {
    Buffer made((size_t)width * 4, 0xff);
    v.kernels->compress_entry(layout, view, entry, every, overlap, bias.data(), width, (float*)made.get());
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0, mean = 0;
      for (int64_t t = std::max<int64_t>(0, overlap ? (entry - 1) * every : 0); t < (entry + 1) * every; ++t) {
        if (!overlap && t < entry * every) continue;
        const int64_t part = t < entry * every ? i : (series - 1) * width + i;
        const double weight =
            std::exp((double)x[(size_t)(t * cols + series * width + part)] + bias[(size_t)(t % every * series * width + part)]);
        sum += weight;
        mean += weight * x[(size_t)(t * cols + part)];
      }
      const float got = ((const float*)made.get())[i];
      if (!check(std::fabs(got - mean / sum) <= 2e-5, "%s %s width=%ld every=%ld overlap=%d: entry %ld [%ld] is %g, not %g",
                 v.name.c_str(), kv_name(type), (long)width, (long)every, overlap, (long)entry, (long)i, got, mean / sum))
        return;
    }
  }
}

// Every entry has a place of its own in the block of its last token, and runs of places are consecutive.
static void places(int64_t every) {
  const EntryPlaces at{every};
  const int64_t in_block = (DSO_BLOCK_TOKENS - 1) / every + 1;
  std::set<int64_t> used;
  for (int64_t entry = 0; entry < 200; ++entry) {
    const int64_t place = at.at(entry), last = (entry + 1) * every - 1;
    check(used.insert(place).second, "every=%ld: entry %ld shares a place", (long)every, (long)entry);
    check(place / DSO_BLOCK_TOKENS == last / DSO_BLOCK_TOKENS && place % DSO_BLOCK_TOKENS < in_block,
          "every=%ld: entry %ld is at %ld", (long)every, (long)entry, (long)place);
    if (entry + 1 < at.end_of_run(entry))
      check(at.at(entry + 1) == place + 1, "every=%ld: entry %ld does not follow", (long)every, (long)entry + 1);
  }
}

static void refused_shapes() {
  const struct {
    int32_t rows[3], rank;
    const char* words;
  } cases[] = {
      {{7, 1, 1}, 0, "a row of 7 elements"}, {{8, 0, 1}, 0, "0 tokens share a row"}, {{8, 1, 1}, 4, "must be 0 with rows"}};
  for (const auto& c : cases) {
    dso_cache_shape shape{};
    shape.layers = 1;
    shape.rank = c.rank;
    shape.rows = c.rows;
    check(dso_cache_block_bytes(&shape) < 0 && strstr(dso_last_error(), c.words), "%s: \"%s\"", c.words, dso_last_error());
  }
}

int main() {
  Random random(4);
  for (const Variant& v : vector_variants())
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8})
      for (int64_t width : {2, 14, 16, 20, 64, 130})
        for (bool overlap : {false, true})
          entries(v, type, width, 1 + random.below(random.below(2) ? 8 : 130), overlap, random);
  for (int64_t every : {1, 2, 3, 4, 5, 7, 16, 31, 32, 33, 64, 100, 128}) places(every);
  refused_shapes();
  return report("test_compress");
}
