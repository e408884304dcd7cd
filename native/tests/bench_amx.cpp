// Kernels on AMX tiles against the vector kernels of AVX-512 that they replace, for benchmarks/amx.py: a line of JSON per
// format and kind of activations of products, and per cache of absorbed attention and of the indexer (with the heads and widths
// of DeepSeek-V3.2), with microseconds of the fastest run on one core.
//   bench_amx amx|amx-emulated [cols] [rows] [seconds per time]
// Build with -DDSO_AMX_VECTOR_TOKENS=0, so that tiles compute any number of tokens.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "latent_fixture.hpp"
#include "timing.hpp"

namespace {

struct Case {
  int format, kind;
};
constexpr Case kCases[] = {
    {DSO_INT4, DSO_SLOT_Q8},  {DSO_INT8, DSO_SLOT_Q8},  {DSO_Q4_1, DSO_SLOT_Q8},   {DSO_INT3, DSO_SLOT_Q8},
    {DSO_INT8, DSO_SLOT_Q16}, {DSO_Q4_K, DSO_SLOT_Q16}, {DSO_BF16, DSO_SLOT_BF16}, {DSO_FP8, DSO_SLOT_BF16},
};
const std::vector<int> kTokens = {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 256};  // of a product
const std::vector<int> kCached = {1, 8, 16, 32, 64, 256, 2048};                   // in the cache

template <class Run>
double microseconds(double least, Run run) {
  double fastest = 1e9, spent = 0;
  for (int i = 0; i < 3 || spent < least; ++i) {
    const double start = seconds();
    run();
    const double took = seconds() - start;
    fastest = std::min(fastest, took);
    spent += took;
  }
  return 1e6 * fastest;
}

double product(const Kernels& k, const Matrix& w, int kind, int T, double least) {
  const size_t stride = (size_t)dso::row_bytes(kind, w.cols);
  Buffer x((size_t)T * stride), scratch(k.linear_scratch);
  std::vector<float> row((size_t)w.cols), y((size_t)T * (size_t)w.rows);
  Random random(2);
  for (int t = 0; t < T; ++t) {
    for (float& v : row) v = random.normal();
    k.convert(kind, row.data(), 0, w.cols, w.cols, x.get() + (size_t)t * stride);
  }
  return microseconds(least, [&] {
    for (int tile = 0; tile < (w.rows + 15) / 16; tile += 12)  // as the runtime splits work
      k.linear(w, nullptr, kind, x.get(), (int64_t)stride, T, true, tile, std::min(tile + 12, (w.rows + 15) / 16), y.data(),
               4 * (int64_t)w.rows, scratch.get());
  });
}

constexpr int64_t kHeads = 128, kIndexHeads = 64, kIndex = 128;

// One row's heads over `tokens` tokens.
double absorbed(const Kernels& k, int32_t type, int64_t tokens, double least) {
  Random random(3);
  LatentCache cache(k, LatentCache::shape(type, 512, 64, 0), tokens, random);
  cache.write(0, normal((size_t)(tokens * cache.width()), 1, random));
  const KvLayout& l = cache.layout;
  const int64_t bytes = k.mla_query_bytes(l);
  const std::vector<float> q = normal((size_t)(kHeads * cache.width()), 1, random);
  Buffer scratch((size_t)k.mla_scratch(l)), packed((size_t)(kHeads / mla_heads * bytes));
  std::vector<float> part((size_t)(mla_heads * (l.rank + 16)));
  for (int64_t h = 0; h < kHeads; h += mla_heads)
    k.mla_query(l, q.data() + h * cache.width(), mla_heads, 0.1f, packed.get() + h / mla_heads * bytes);
  return microseconds(least, [&] {
    for (int64_t t = 0; t < tokens; t += attn_chunk) {
      const int64_t n = std::min(attn_chunk, tokens - t);
      k.mla_tokens(l, cache.view, nullptr, t, n, scratch.get());
      for (int64_t h = 0; h < kHeads; h += mla_heads)
        k.mla_attend(l, packed.get() + h / mla_heads * bytes, mla_heads, 0, n, part.data(), scratch.get());
    }
  });
}

double indexer(const Kernels& k, int64_t tokens, double least) {
  Random random(3);
  LatentCache cache(k, LatentCache::shape(DSO_KV_BF16, 512, 64, kIndex), tokens, random);
  const std::vector<float> keys = normal((size_t)(tokens * kIndex), 1, random), w = normal(kIndexHeads, 1, random),
                           q = normal(kIndexHeads * kIndex, 1, random);
  k.index_write(cache.layout, cache.view, 0, tokens, keys.data(), 4 * kIndex);
  Buffer packed((size_t)k.index_query_bytes(kIndexHeads, kIndex));
  std::vector<float> scores((size_t)tokens);
  k.index_query(cache.layout, kIndexHeads, q.data(), packed.get());
  return microseconds(least, [&] {
    k.index_scores(cache.layout, cache.view, kIndexHeads, packed.get(), w.data(), 0, tokens, 0.1f, scores.data());
  });
}

template <class Time>  // of kernels and a number of tokens
void line(const char* kernel, const char* format, int kind, const std::vector<int>& tokens, const Kernels& tiles,
          const Kernels& vectors, Time time) {
  printf("{\"kernel\": \"%s\", \"format\": \"%s\", \"kind\": %d, \"tokens\": [", kernel, format, kind);
  for (size_t i = 0; i < tokens.size(); ++i) printf("%s%d", i ? ", " : "", tokens[i]);
  for (const bool vector : {false, true}) {
    printf("], \"%s\": [", vector ? "vectors" : "tiles");
    for (size_t i = 0; i < tokens.size(); ++i) printf("%s%.6g", i ? ", " : "", time(vector ? vectors : tiles, tokens[i]));
  }
  printf("]}\n");
  fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = argc > 1 ? argv[1] : "amx";
  const int cols = argc > 2 ? atoi(argv[2]) : 2048, rows = argc > 3 ? atoi(argv[3]) : 2048;
  const double least = argc > 4 ? atof(argv[4]) : 0.1;
  dso_context* context = nullptr;  // says what is missing, and asks the system for the tiles
  if (dso_context_create(isa, 1, &context) != 0) {
    fprintf(stderr, "%s\n", dso_last_error());
    return 2;
  }
  dso_context_destroy(context);
  const Kernels& tiles = strcmp(isa, "amx") == 0 ? *kernels_amx() : *kernels_amx_emulated();
  const Kernels& vectors = *kernels_avx512_bf16();
  for (const Case& c : kCases) {
    std::vector<float> values((size_t)rows * (size_t)cols);
    Random random(1);
    for (float& v : values) v = random.normal();
    Buffer data((size_t)dso::packed_bytes(c.format, rows, cols));
    if (c.format == DSO_Q4_K) {  // packed from ggml's blocks only: any codes, finite scales
      for (size_t i = 0; i < data.size(); ++i) data[i] = (uint8_t)(i * 2654435761u >> 13) & 0x1f;
    } else {
      for (int tile = 0; tile < (rows + dso::band_rows(c.format) - 1) / dso::band_rows(c.format); ++tile)
        vectors.pack_tile(c.format, DSO_SRC_F32, values.data(), rows, cols, 4 * cols, nullptr, tile, data.get());
    }
    const Matrix w = {c.format, rows, cols, data.get()};
    line("linear", dso::format_name(c.format), c.kind, kTokens, tiles, vectors,
         [&](const Kernels& k, int T) { return product(k, w, c.kind, T, least); });
  }
  for (int32_t type : {DSO_KV_BF16, DSO_KV_INT8})
    line("absorbed", kv_name(type), 0, kCached, tiles, vectors,
         [&](const Kernels& k, int tokens) { return absorbed(k, type, tokens, least); });
  line("indexer", "bf16", 0, kCached, tiles, vectors, [&](const Kernels& k, int tokens) { return indexer(k, tokens, least); });
}
