// Speed of latent attention on one thread, with the shapes of DeepSeek-V2-Lite (16 heads) and V3 (128), rank 512 and rope 64.
// Decode, absorbed: GB/s of cache read, GMAC/s, and nanoseconds for 16 heads and a block of 32 tokens. Prefill of 512 rows
// after 4,096 tokens: GMAC/s of both forms, and time per row and head. Best of several runs. Usage: bench_mla [variant]. Prints
// a table, then one line of JSON.
#include "latent_fixture.hpp"
#include "timing.hpp"

constexpr int64_t kRank = 512, kRope = 64, kNope = 128, kValue = 128, kWidth = kRank + kRope;

struct Case {
  const Kernels& k;
  LatentCache cache;
  Buffer scratch;

  Case(const Variant& v, int32_t type, int64_t tokens, Random& random)
      : k(*v.kernels),
        cache(k, LatentCache::shape(type, kRank, kRope, 0), tokens, random),
        scratch((size_t)k.mla_scratch(cache.layout)) {
    const std::vector<float> x = normal((size_t)(256 * kWidth), 1, random);
    for (int64_t t = 0; t < tokens; t += 256) cache.write(t, x);
  }
  // One row of `heads` heads over tokens [0, context), which start at block `at` of the table.
  void absorbed(const float* q, int64_t heads, int64_t at, int64_t context, std::vector<uint8_t>& packed, float* parts,
                float* out) {
    const KvLayout& l = cache.layout;
    const KvView view = {cache.view.base, cache.view.block_stride, cache.view.table + at};
    const int64_t bytes = k.mla_query_bytes(l), part = kRank + 16, chunks = (context + attn_chunk - 1) / attn_chunk;
    for (int64_t h = 0; h < heads; h += mla_heads)
      k.mla_query(l, q + h * kWidth, mla_heads, 0.1f, packed.data() + h / mla_heads * bytes);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t n = std::min(attn_chunk, context - c * attn_chunk);
      k.mla_tokens(l, view, nullptr, c * attn_chunk, n, scratch.get());
      for (int64_t h = 0; h < heads; h += mla_heads)
        k.mla_attend(l, packed.data() + h / mla_heads * bytes, mla_heads, 0, n, parts + (c * heads + h) * part, scratch.get());
    }
    for (int64_t h = 0; h < heads; ++h) k.attn_merge(parts + h * part, heads * part, chunks, kRank, nullptr, out + h * kRank);
  }
};

static void decode(const Variant& v, int32_t type, int64_t heads, int64_t context, std::string& json) {
  Random random(4);
  const int64_t bytes = context * latent_row_bytes(type, kRank, kRope),
                sequences = (96 << 20) / bytes + 1;  // more than the last-level cache
  Case c(v, type, sequences * context, random);
  const std::vector<float> q = normal((size_t)(heads * kWidth), 1, random);
  std::vector<uint8_t> packed((size_t)(heads / mla_heads * c.k.mla_query_bytes(c.cache.layout)));
  std::vector<float> parts((size_t)((context + attn_chunk - 1) / attn_chunk * heads * (kRank + 16))),
      out((size_t)(heads * kRank));
  int64_t next = 0;
  const double t = best([&] {
    c.absorbed(q.data(), heads, next * context / 32, context, packed, parts.data(), out.data());
    next = (next + 1) % sequences;
  });
  const double macs = (double)(heads * context * (2 * kRank + kRope));
  printf("%-12s decode  %-4s %3ld heads %6ld tokens %6.2f GB/s %7.1f GMAC/s %7.0f ns a block\n", v.name.c_str(), kv_name(type),
         (long)heads, (long)context, (double)bytes / t * 1e-9, macs / t * 1e-9,
         t * 1e9 / (double)(context / 32 * (heads / mla_heads)));
  char line[256];
  snprintf(line, sizeof line,
           "%s{\"isa\":\"%s\",\"family\":\"decode\",\"kv\":\"%s\",\"heads\":%ld,\"context\":%ld,\"gbs\":%.2f,\"gmacs\":%.1f}",
           json.empty() ? "" : ",", v.name.c_str(), kv_name(type), (long)heads, (long)context, (double)bytes / t * 1e-9,
           macs / t * 1e-9);
  json += line;
}

// One head, expanded with kv_b in this format, and absorbed as one set of 16 heads.
static void prefill(const Variant& v, int32_t type, int32_t format, std::string& json) {
  constexpr int64_t context = 4096, rows = 512, shared = 8;  // shared: rows per absorbed task
  Random random(5);
  Case c(v, type, context + rows, random);
  const Kernels& k = c.k;
  const KvLayout& l = c.cache.layout;
  const MlaHead head = {kNope, kRope, kValue, false};
  const int32_t kind = finest_kind(format);
  const std::vector<float> w = normal((size_t)((kNope + kValue) * kRank), 0.04f, random),
                           q = normal((size_t)(rows * mla_heads * kWidth), 1, random);
  std::vector<uint8_t> packed_w(::packed_bytes(format, kNope + kValue, kRank)),
      queries((size_t)(shared * k.mla_query_bytes(l)));
  for (int64_t tile = 0; tile < (kNope + kValue) / 16; ++tile)
    k.pack_tile(format, DSO_SRC_F32, w.data(), kNope + kValue, kRank, kRank * 4, nullptr, tile, packed_w.data());
  const Matrix kv_b = {format, int32_t(kNope + kValue), int32_t(kRank), packed_w.data()};
  const int64_t row = (int64_t)::row_bytes(kind, kRank);
  Buffer latents((size_t)(attn_chunk * row)), panels((size_t)k.mla_panel_bytes(head)),
      scratch(std::max(k.attn_scratch, k.linear_scratch) + 64);
  std::vector<float> kv((size_t)(64 * (kNope + kValue))), out((size_t)(rows * kValue)), m((size_t)rows), sum((size_t)rows),
      room((size_t)kRank);
  const double expanded = best([&] {
    std::fill(m.begin(), m.end(), -INFINITY);
    std::fill(sum.begin(), sum.end(), 0.0f);
    std::fill(out.begin(), out.end(), 0.0f);
    for (int64_t first = 0; first < context + rows; first += attn_chunk) {
      k.mla_rows(l, c.cache.view, first, attn_chunk, kind, room.data(), latents.get(), row);
      for (int64_t i = 0; i < attn_chunk; i += 64) {
        k.linear(kv_b, nullptr, kind, latents.get() + i * row, row, 64, true, 0, (kNope + kValue) / 16, kv.data(),
                 4 * (kNope + kValue), scratch.get());
        k.mla_panels(l, c.cache.view, head, first + i, 64, kv.data(), 4 * (kNope + kValue), panels.get());
      }
      k.mla_expanded(head, panels.get(), first / attn_chunk, q.data(), 4 * (kNope + kRope), 0, rows, context, {}, 0.1f,
                     m.data(), sum.data(), out.data(), 4 * kValue, scratch.get());
    }
  });
  std::vector<float> part((size_t)(mla_heads * (kRank + 16)));
  const double absorbed = best([&] {  // only the last rows
    for (int64_t r = 0; r < shared; ++r)
      k.mla_query(l, q.data() + r * mla_heads * kWidth, mla_heads, 0.1f, queries.data() + r * k.mla_query_bytes(l));
    for (int64_t first = 0; first < context + rows; first += attn_chunk) {
      k.mla_tokens(l, c.cache.view, nullptr, first, attn_chunk, c.scratch.get());
      for (int64_t r = 0; r < shared; ++r)
        k.mla_attend(l, queries.data() + r * k.mla_query_bytes(l), mla_heads, 0, attn_chunk, part.data(), c.scratch.get());
    }
  });
  const double pairs = (double)rows * context + rows * (rows + 1) / 2.0,
               made = (double)(context + rows) * kRank * (kNope + kValue);
  const double expanded_speed = (made + pairs * (kNope + kRope + kValue)) / expanded * 1e-9;
  const double absorbed_speed = (double)(shared * mla_heads * (context + rows) * (2 * kRank + kRope)) / absorbed * 1e-9;
  printf("%-12s prefill %-4s kv_b %-4s expanded %7.1f GMAC/s %6.2f us a row, absorbed %7.1f GMAC/s %6.2f us\n", v.name.c_str(),
         kv_name(type), ::format_name(format), expanded_speed, expanded / rows * 1e6, absorbed_speed,
         absorbed / (shared * mla_heads) * 1e6);
  char line[256];
  snprintf(
      line, sizeof line,
      ",{\"isa\":\"%s\",\"family\":\"prefill\",\"kv\":\"%s\",\"kv_b\":\"%s\",\"expanded_gmacs\":%.1f,\"absorbed_gmacs\":%.1f}",
      v.name.c_str(), kv_name(type), ::format_name(format), expanded_speed, absorbed_speed);
  json += line;
}

int main(int argc, char** argv) {
  std::string json;
  for (const Variant& v : variants()) {
    if (argc > 1 && v.name != argv[1]) continue;
    for (int32_t type : {DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int64_t heads : {16, 128})
        for (int64_t context : {512, 4096, 32768}) decode(v, type, heads, context, json);
      for (int32_t format : {DSO_BF16, DSO_INT8}) prefill(v, type, format, json);
    }
  }
  printf("[%s]\n", json.c_str());
  return failures ? 1 : 0;
}
