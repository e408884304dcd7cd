// Speed of attention on one thread: decode in GB/s of cache read, beside what plain loads of the same memory reach, and
// prefill in GFLOP/s (four operations for a visible pair of query and key, per dimension). Best of several runs.
// Usage: bench_attention [variant]. A table, then one line of JSON.
#include <immintrin.h>

#include <algorithm>

#include "kv_fixture.hpp"
#include "timing.hpp"

struct Shape {
  int32_t kv_heads, group, head_dim;
};

struct Case {
  const Variant& variant;
  Shape shape;
  int32_t type;
  Cache cache;
  std::vector<float> q;
  Buffer scratch;

  Case(const Variant& v, Shape s, int32_t type, int64_t tokens, int64_t rows, Random& random)
      : variant(v), shape(s), type(type), cache(*v.kernels, type, s.kv_heads, s.head_dim, tokens, random), q(normal((size_t)(rows * width()), 1, random)),
        scratch(v.kernels->attn_scratch) {
    const std::vector<float> x = normal((size_t)(256 * cache.width()), 1, random);
    for (int64_t t = 0; t < tokens; t += 256) cache.write(t, std::min<int64_t>(256, tokens - t), x.data(), x.data());
  }
  int64_t width() const { return (int64_t)shape.kv_heads * shape.group * shape.head_dim; }
  float scale() const { return 1.0f / std::sqrt((float)shape.head_dim); }
};

// What one thread can read of the same memory with plain loads.
static double read_speed(Buffer& memory) {
  const __m128i* p = (const __m128i*)memory.get();
  const size_t n = memory.size() / sizeof(__m128i);
  const double t = best([&] {
    __m128i s[8] = {};
    for (size_t i = 0; i + 8 <= n; i += 8)
      for (size_t j = 0; j < 8; ++j) s[j] = _mm_or_si128(s[j], _mm_load_si128(p + i + j));
    for (__m128i& x : s) __asm__ volatile("" : : "x"(x));
  });
  return (double)memory.size() / t * 1e-9;
}

// As many sequences of 4,096 tokens as exceed the last-level cache.
static void decode(const Variant& v, Shape s, int32_t type, std::string& json) {
  constexpr int64_t context = 4096;
  Random random(4);
  const int64_t one = v.kernels->kv_layer_bytes(type, s.kv_heads, s.head_dim) * context / 32, sequences = (96 << 20) / one + 1;
  Case c(v, s, type, sequences * context, 1, random);
  const int64_t part = s.head_dim + 16;
  std::vector<float> parts((size_t)(context / attn_chunk * s.group * part)), out((size_t)c.width());
  const double t = best([&] {
    for (int64_t i = 0; i < sequences; ++i) {
      const KvView view = {c.cache.view.base, c.cache.view.block_stride, c.cache.view.table + i * context / 32};
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const float* q = c.q.data() + h * s.group * s.head_dim;
        for (int64_t k = 0; k < context / attn_chunk; ++k)
          v.kernels->attn_decode_chunk(c.cache.layout, view, h, q, c.width() * 4, s.group, 0, 1, context - 1, Sight{}, c.scale(), k, parts.data() + k * s.group * part, c.scratch.get());
        for (int64_t g = 0; g < s.group; ++g)
          v.kernels->attn_merge(parts.data() + g * part, s.group * part, context / attn_chunk, s.head_dim, out.data() + (h * s.group + g) * s.head_dim);
      }
    }
  });
  const double speed = (double)(one * sequences) / t * 1e-9, limit = read_speed(c.cache.memory);
  printf("%-12s decode  %-4s %2d/%d x %-3d %7.1f GB/s  %3.0f%% of %.1f\n", v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, speed, 100 * speed / limit, limit);
  char line[256];
  snprintf(line, sizeof line, "%s{\"isa\":\"%s\",\"family\":\"decode\",\"kv\":\"%s\",\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"gbs\":%.2f,\"limit_gbs\":%.2f}", json.empty() ? "" : ",",
           v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, speed, limit);
  json += line;
}

static void prefill(const Variant& v, Shape s, int32_t type, std::string& json) {
  constexpr int64_t context = 4096, rows = 128;
  Random random(5);
  Case c(v, s, type, context + rows, rows, random);
  std::vector<float> out((size_t)(rows * c.width()));
  const double t = best([&] {
    for (int64_t h = 0; h < s.kv_heads; ++h)
      for (int64_t r = 0; r < rows; r += attn_rows) {
        const int64_t at = h * s.group * s.head_dim;
        v.kernels->attn_prefill(c.cache.layout, c.cache.view, h, c.q.data() + at, c.width() * 4, s.group, r, r + attn_rows, context, Sight{}, c.scale(), out.data() + at, c.width() * 4, c.scratch.get());
      }
  });
  const double pairs = (double)rows * context + rows * (rows + 1) / 2.0, speed = 4 * pairs * (double)c.width() / t * 1e-9;
  printf("%-12s prefill %-4s %2d/%d x %-3d %7.1f GFLOP/s\n", v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, speed);
  char line[256];
  snprintf(line, sizeof line, ",{\"isa\":\"%s\",\"family\":\"prefill\",\"kv\":\"%s\",\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"gflops\":%.1f}", v.name.c_str(), kv_name(type),
           s.kv_heads * s.group, s.kv_heads, s.head_dim, speed);
  json += line;
}

int main(int argc, char** argv) {
  std::string json;
  for (const Variant& v : variants()) {
    if (argc > 1 && v.name != argv[1]) continue;
    for (const Shape s : {Shape{2, 6, 128}, Shape{3, 3, 64}, Shape{8, 1, 64}})
      for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8}) {
        decode(v, s, type, json);
        prefill(v, s, type, json);
      }
  }
  printf("[%s]\n", json.c_str());
  return failures ? 1 : 0;
}
