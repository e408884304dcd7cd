// The cache's storage: content is read as written within the format's error, in any order and chunks, and nothing else changes.
#include "int4_rows.hpp"
#include "kv_fixture.hpp"

// The token's row as `type` stores it, in plain code.
static void expected_row(int type, const float* x, int64_t d, float* out) {
  if (type == DSO_KV_INT4) {
    const std::vector<float> row = int4_stored(x, d);
    std::copy(row.begin(), row.end(), out);
    return;
  }
  float top = 0;
  for (int64_t i = 0; i < d; ++i) top = std::fmax(top, std::fabs(x[i]));
  for (int64_t i = 0; i < d; ++i)
    out[i] = type == DSO_KV_F32    ? x[i]
             : type == DSO_KV_BF16 ? rounded_bf16(x[i])
                                   : (float)(int)std::nearbyint(x[i] * (127.0f / top)) * (top / 127.0f);
}

static void round_trip(const Variant& v, int type, int32_t heads, int32_t d, int64_t tokens, Random& random) {
  Cache cache(*v.kernels, type, heads, d, tokens, random);
  check(cache.layout.layer_bytes % 64 == 0, "%s: layer_bytes %ld is no multiple of 64", v.name.c_str(),
        (long)cache.layout.layer_bytes);
  const int64_t width = cache.width();
  const std::vector<float> k = normal((size_t)(tokens * width), 2, random), val = normal((size_t)(tokens * width), 3, random);
  std::vector<int64_t> cuts = {0};  // appended in chunks, each range of heads separately
  while (cuts.back() < tokens)
    cuts.push_back(std::min<int64_t>(tokens, cuts.back() + 1 + random.below(random.below(3) ? 5 : 70)));
  std::vector<size_t> order;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) order.push_back(i);
  if (random.below(2)) random.shuffle(order);  // threads may write them in any order
  for (size_t i : order) {
    const int split = random.below(heads + 1);
    for (int part = 0; part < 2; ++part)
      v.kernels->kv_write(cache.layout, cache.view, cuts[i], cuts[i + 1] - cuts[i], k.data() + cuts[i] * width, width * 4,
                          val.data() + cuts[i] * width, width * 4, part ? split : 0, part ? heads : split);
  }
  cache.tokens = tokens;
  std::vector<float> key, value, row((size_t)d);
  cache.read(key, value);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t t = 0; t < tokens; ++t)
      for (int which = 0; which < 2; ++which) {
        expected_row(type, (which ? val : k).data() + t * width + h * d, d, row.data());
        const float* got = (which ? value : key).data() + (h * tokens + t) * d;
        for (int64_t i = 0; i < d; ++i)
          if (!check(same(got[i], row[(size_t)i]), "%s %s d=%d head %ld token %ld %s[%ld]: %g, not %g", v.name.c_str(),
                     kv_name(type), d, (long)h, (long)t, which ? "v" : "k", (long)i, got[i], row[(size_t)i]))
            return;
      }
}

// Unwritten slots keep their bytes: a token is written without touching its neighbors.
static void neighbors(const Variant& v, int type, int32_t d, Random& random) {
  Cache cache(*v.kernels, type, 2, d, 32, random);
  const std::vector<float> k = normal((size_t)(32 * cache.width()), 1, random);
  cache.write(0, 32, k.data(), k.data());
  std::vector<float> before_k, before_v, after_k, after_v;
  cache.read(before_k, before_v);
  const int slot = random.below(32), n = 1 + random.below(32 - slot);
  const std::vector<float> other = normal((size_t)(n * cache.width()), 1, random);
  v.kernels->kv_write(cache.layout, cache.view, slot, n, other.data(), cache.width() * 4, other.data(), cache.width() * 4, 1,
                      2);
  cache.read(after_k, after_v);
  for (int h = 0; h < 2; ++h)
    for (int t = 0; t < 32; ++t) {
      const bool written = h == 1 && t >= slot && t < slot + n;
      const size_t at = (size_t)((h * 32 + t) * d) * 4, bytes = (size_t)d * 4;
      const bool equal = !memcmp((char*)before_k.data() + at, (char*)after_k.data() + at, bytes) &&
                         !memcmp((char*)before_v.data() + at, (char*)after_v.data() + at, bytes);
      check(equal != written, "%s %s d=%d: write of [%d, %d) to head 1: head %d token %d %s", v.name.c_str(), kv_name(type), d,
            slot, slot + n, h, t, written ? "did not change" : "changed");
    }
}

static void special_values(const Variant& v, Random& random) {
  const int32_t d = 40;
  for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4})
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      Cache cache(*v.kernels, type, 1, d, 32, random);
      std::vector<float> k = normal((size_t)(3 * d), 1, random), key, value;
      k[d + 7] = bad;                                          // token 1
      for (int i = 0; i < d; ++i) k[(size_t)(2 * d + i)] = 0;  // token 2: no magnitude
      cache.write(0, 3, k.data(), k.data());
      cache.read(key, value);
      check(std::isfinite(key[0]) && std::isfinite(value[d - 1]), "%s %s: a neighbor's %g spread", v.name.c_str(),
            kv_name(type), bad);
      check(std::isnan(bad) || type >= DSO_KV_INT8 ? std::isnan(key[d + 7]) && std::isnan(value[d + 7])
                                                   : key[d + 7] == bad && value[d + 7] == bad,
            "%s %s: %g came back as %g", v.name.c_str(), kv_name(type), bad, key[d + 7]);
      for (int i = 0; i < d; ++i)
        check(key[(size_t)(2 * d + i)] == 0, "%s %s: zero came back as %g", v.name.c_str(), kv_name(type),
              key[(size_t)(2 * d + i)]);
    }
}

int main() {
  Random random(1);
  for (const Variant& v : vector_variants())
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int32_t d : {2, 6, 16, 18, 40, 64, 80, 96, 128, 254, 256, 512}) {
        round_trip(v, type, 1 + random.below(4), d, 1 + random.below(150), random);
        neighbors(v, type, d, random);
      }
      special_values(v, random);
    }
  return report("test_kv");
}
