// Cached keys rotated to other positions, against keys computed there in double: every storage type and ISA, and nothing else
// is touched.
#include <algorithm>
#include <cmath>

#include "cache.hpp"
#include "int4_rows.hpp"
#include "plan_parts.hpp"

namespace {

struct Keys {  // the rotated elements of a token's row: [offset, offset + rot) of `width`
  int32_t width, rot, offset;
  bool interleaved;
};

std::vector<float> frequencies(int rot, double theta) {
  std::vector<float> f((size_t)(rot / 2));
  for (size_t i = 0; i < f.size(); ++i) f[i] = (float)std::pow(theta, -2.0 * (double)i / rot);
  return f;
}

// The row of a token at `position`, in double. Angles are ROPE_TABLE's: products in fp32.
template <class Real>
std::vector<double> turned(const std::vector<Real>& x, const Keys& k, const std::vector<float>& f, float from, float to) {
  std::vector<double> out(x.begin(), x.end());
  for (int i = 0; i < k.rot / 2; ++i) {
    const double angle = (double)(float)(to * f[(size_t)i]) - (double)(float)(from * f[(size_t)i]);
    const size_t a = (size_t)(k.offset + (k.interleaved ? 2 * i : i)), b = a + (size_t)(k.interleaved ? 1 : k.rot / 2);
    out[a] = (double)x[a] * std::cos(angle) - (double)x[b] * std::sin(angle);
    out[b] = (double)x[b] * std::cos(angle) + (double)x[a] * std::sin(angle);
  }
  return out;
}

// Maximum error of storing x: half a step of the storage type.
double half_step(int type, const std::vector<double>& x, size_t i) {
  double top = 0;
  for (double v : x) top = std::max(top, std::fabs(v));
  if (type == DSO_KV_INT4) {  // of the transform, at most 14 of 127 parts of its largest element, or a smaller squared error
    std::vector<double> y = x;
    hadamard(y.data(), (int64_t)y.size(), false);
    double square = 0;
    for (double v : y) square = std::max(square, v * v);
    return std::sqrt((double)y.size() * square) * 14 / 127;
  }
  return type == DSO_KV_F32 ? 2e-7 * top : type == DSO_KV_BF16 ? std::fabs(x[i]) / 256 + 2e-7 * top : top / 254 * (1 + 1e-4);
}

dso_rotation rotation(const Keys& k, const std::vector<float>& f) {
  return {f.data(), k.rot, k.offset, k.interleaved ? DSO_FLAG_INTERLEAVED : 0, 0};
}

std::vector<uint8_t> bytes_of(const dso_cache& k) { return {k.arena.data(), k.arena.data() + k.blocks * k.block_bytes()}; }

// A cache of 3 layers and 6 blocks, all of them written; a sequence uses three of them.
struct Case {
  static constexpr int layers = 3, tokens = 75, position = 40;
  const int32_t table[3] = {4, 1, 3};
  int type, heads;
  Keys key, index;  // index.width 0: none
  int rank;         // 0: keys and values of heads
  std::vector<float> f, g;
  dso_cache* cache = nullptr;

  Case(const Variant& v, int type, int heads, Keys key, int rank, Keys index, double theta, Random& random)
      : type(type),
        heads(heads),
        key(key),
        index(index),
        rank(rank),
        f(frequencies(key.rot, theta)),
        g(frequencies(std::max(2, index.rot), 100.0)) {
    const dso_cache_shape shape = rank ? dso_cache_shape{type, layers, 0, 0, rank, key.width, index.width, 0, nullptr}
                                       : dso_cache_shape{type, layers, heads, key.width, 0, 0, 0, 0, nullptr};
    check(dso_cache_create(&shape, 6, &cache) == 0, "%s", dso_last_error());
    const int32_t all[] = {0, 1, 2, 3, 4, 5};
    for (int layer = 0; layer < layers; ++layer) {
      const int64_t width = rank ? rank + key.width : heads * key.width;
      const std::vector<float> a = normal((size_t)(6 * 32 * width), 1, random), b = normal(a.size(), 1, random),
                               c = normal((size_t)(6 * 32 * std::max(1, index.width)), 1, random);
      const KvView view = cache->view(layer, all);
      for (int64_t t = 0; t < 6 * 32; t += 32) {
        if (!rank)
          v.kernels->kv_write(cache->layout(layer), view, t, 32, a.data() + t * width, width * 4, b.data() + t * width,
                              width * 4, 0, heads);
        else
          v.kernels->latent_write(cache->layout(layer), view, t, 32, a.data() + t * width, width * 4);
        if (index.width) v.kernels->index_write(cache->layout(layer), view, t, 32, c.data() + t * index.width, index.width * 4);
      }
    }
  }
  ~Case() { dso_cache_destroy(cache); }

  int32_t turn(dso_context* c, int32_t at, int32_t delta) const {
    const dso_rotation k = rotation(key, f), i = rotation(index, g);
    return dso_cache_rotate(c, cache, &k, index.width ? &i : nullptr, 0, table, tokens, at, delta);
  }
  struct Rows {  // for one layer: rotated keys, row after row; and the data that must not change
    std::vector<float> key, value, index, latent;
  };
  Rows read(int layer) const {
    Rows r;
    const size_t n = tokens;
    if (!rank) {
      r.key.resize(n * (size_t)(heads * key.width));
      r.value.resize(r.key.size());
      check(dso_cache_read(cache, layer, table, tokens, r.key.data(), r.value.data()) == 0, "%s", dso_last_error());
      return r;
    }
    std::vector<float> rows(n * (size_t)(rank + key.width));
    r.index.resize(n * (size_t)index.width);
    check(dso_cache_read(cache, layer, table, tokens, rows.data(), index.width ? r.index.data() : nullptr) == 0, "%s",
          dso_last_error());
    for (size_t t = 0; t < n; ++t) {
      const auto row = rows.begin() + (long)t * (rank + key.width);
      r.latent.insert(r.latent.end(), row, row + rank);
      r.key.insert(r.key.end(), row + rank, row + rank + key.width);
    }
    return r;
  }
};

void compare(const char* name, int type, const Keys& k, const std::vector<float>& f, const std::vector<float>& before,
             const std::vector<float>& after, int delta) {
  const int rows = (int)before.size() / k.width;
  for (int r = 0; r < rows; ++r) {
    const int token = r % Case::tokens;  // heads are outermost
    const auto row = before.begin() + r * k.width;
    const float at = (float)(Case::position + token);
    const std::vector<double> expected = turned(std::vector<float>(row, row + k.width), k, f, at, at + (float)delta);
    for (int i = 0; i < k.width; ++i) {
      const double error = std::fabs(after[(size_t)(r * k.width + i)] - expected[(size_t)i]);
      if (!check(error <= half_step(type, expected, (size_t)i), "%s %s rot %d of %d from %d%s: row %d number %d is off by %g",
                 name, kv_name(type), k.rot, k.width, k.offset, k.interleaved ? ", interleaved" : "", r, i, error))
        return;
    }
  }
}

// One rotation gives the key of the new position, within half a step of its storage; all else keeps its bytes.
void one_turn(const Variant& v, int type, int heads, Keys key, int rank, Keys index, Random& random) {
  Case c(v, type, heads, key, rank, index, 10000, random);
  OwnContext one(*v.kernels, 1), many(*v.kernels, 3);
  std::vector<Case::Rows> before;
  for (int layer = 0; layer < Case::layers; ++layer) before.push_back(c.read(layer));
  const std::vector<uint8_t> whole = bytes_of(*c.cache);
  const int delta = random.below(2) ? 7 + random.below(3000) : -1 - random.below(Case::position);
  check(c.turn(one.c, Case::position, delta) == 0, "%s: %s", v.name.c_str(), dso_last_error());
  const std::vector<uint8_t> after = bytes_of(*c.cache);
  for (int layer = 0; layer < Case::layers; ++layer) {
    const Case::Rows rows = c.read(layer);
    const int stored = !rank ? type : type == DSO_KV_INT8 ? int(DSO_KV_BF16) : type == DSO_KV_INT4 ? int(DSO_KV_INT8) : type;
    compare(v.name.c_str(), stored, key, c.f, before[(size_t)layer].key, rows.key, delta);
    if (index.width)
      compare(v.name.c_str(), type == DSO_KV_F32 ? type : int(DSO_KV_BF16), index, c.g, before[(size_t)layer].index, rows.index,
              delta);
    check(rows.value == before[(size_t)layer].value && rows.latent == before[(size_t)layer].latent,
          "%s %s: values or latents changed", v.name.c_str(), kv_name(type));
    if (index.width)  // elements that are not rotated keep their bits
      for (int t = 0; t < Case::tokens; ++t)
        for (int i = 0; i < index.width; ++i)
          if (i < index.offset || i >= index.offset + index.rot)
            check(rows.index[(size_t)(t * index.width + i)] == before[(size_t)layer].index[(size_t)(t * index.width + i)],
                  "%s: index number %d changed", v.name.c_str(), i);
  }
  const int64_t bytes = c.cache->block_bytes();
  for (int block : {0, 2, 5})
    check(!memcmp(whole.data() + block * bytes, after.data() + block * bytes, (size_t)bytes),
          "%s: block %d changed, which is not the sequence's", v.name.c_str(), block);
  // The same bytes with three threads.
  std::copy(whole.begin(), whole.end(), c.cache->arena.data());
  check(c.turn(many.c, Case::position, delta) == 0 && bytes_of(*c.cache) == after, "%s: depends on threads", v.name.c_str());
  // Rotation by zero changes nothing.
  check(c.turn(many.c, Case::position, 0) == 0 && bytes_of(*c.cache) == after, "%s: a rotation by zero changed bytes",
        v.name.c_str());
}

// Eight rotations by a quarter of a window of 8,192: the error against keys computed at the final position. Returns the maximum
// and root mean square error after each, relative to a key's root mean square.
struct Drift {
  double most[8] = {}, mean[8] = {};
};
Drift drift(const Variant& v, int type, Random& random) {
  const Keys key{64, 64, 0, false};
  Case c(v, type, 2, key, 0, {0, 0, 0, false}, 100000, random);
  OwnContext one(*v.kernels, 1);
  const int start = 8 * 2048 + 1000;
  const std::vector<float> before = c.read(1).key;
  Drift d;
  for (int turn = 0; turn < 8; ++turn) {
    check(c.turn(one.c, start - 2048 * turn, -2048) == 0, "%s", dso_last_error());
    const std::vector<float> after = c.read(1).key;
    double square = 0, all = 0;
    for (size_t r = 0; r < before.size() / 64; ++r) {
      const auto row = before.begin() + (long)r * 64;
      const float at = (float)(start + (int)(r % Case::tokens));
      const std::vector<double> expected =
          turned(std::vector<float>(row, row + 64), key, c.f, at, at - 2048.0f * (float)(turn + 1));
      for (size_t i = 0; i < 64; ++i) {
        const double error = after[r * 64 + i] - expected[i];
        d.most[turn] = std::max(d.most[turn], std::fabs(error));
        square += error * error;
        all += expected[i] * expected[i];
      }
    }
    d.mean[turn] = std::sqrt(square / all);
  }
  return d;
}

// Rounding accumulates like independent errors, with the root of the count; angles add no error.
void drifts(const Variant& v, Random& random) {
  const Drift f32 = drift(v, DSO_KV_F32, random), bf16 = drift(v, DSO_KV_BF16, random), int8 = drift(v, DSO_KV_INT8, random),
              int4 = drift(v, DSO_KV_INT4, random);
  printf("%s, relative error after 1, 2, 4, 8 rotations: f32 %.1e %.1e %.1e %.1e", v.name.c_str(), f32.mean[0], f32.mean[1],
         f32.mean[3], f32.mean[7]);
  for (const auto& [name, d] : {std::pair("bf16", &bf16), {"int8", &int8}, {"int4", &int4}})
    printf(", %s %.2g%% %.2g%% %.2g%% %.2g%%", name, 100 * d->mean[0], 100 * d->mean[1], 100 * d->mean[3], 100 * d->mean[7]);
  printf("\n");
  for (int n = 1; n <= 8; ++n) {
    const double root = std::sqrt(n);
    check(f32.mean[n - 1] < 6e-8 * root && f32.most[n - 1] < 1e-6 * root, "%s f32: %g, %g after %d rotations", v.name.c_str(),
          f32.mean[n - 1], f32.most[n - 1], n);
    check(bf16.mean[n - 1] < 0.0018 * root, "%s bf16: %g after %d rotations", v.name.c_str(), bf16.mean[n - 1], n);
    check(int8.mean[n - 1] < 0.0070 * root, "%s int8: %g after %d rotations", v.name.c_str(), int8.mean[n - 1], n);
    check(int4.mean[n - 1] < 0.11 * root, "%s int4: %g after %d rotations", v.name.c_str(), int4.mean[n - 1], n);
    check(bf16.mean[n - 1] > 0.0010 * root && int8.mean[n - 1] > 0.0045 * root,
          "%s: no rounding after %d rotations: nothing was rotated", v.name.c_str(), n);
  }
}

// A NaN stays in its token, and a zero key stays zero.
void special_values(const Variant& v, int type, Random& random) {
  const int32_t table[] = {0};
  const dso_cache_shape shape{type, 1, 1, 16, 0, 0, 0, 0, nullptr};
  dso_cache* k = nullptr;
  check(dso_cache_create(&shape, 1, &k) == 0, "%s", dso_last_error());
  std::vector<float> x = normal(32 * 16, 1, random), key(x.size()), value(x.size());
  x[16 + 3] = NAN;
  x[2 * 16 + 5] = INFINITY;
  std::fill_n(x.begin() + 3 * 16, 16, 0.0f);
  v.kernels->kv_write(k->layout(0), k->view(0, table), 0, 32, x.data(), 64, x.data(), 64, 0, 1);
  OwnContext c(*v.kernels, 1);
  const std::vector<float> f = frequencies(16, 100);
  const dso_rotation r{f.data(), 16, 0, 0, 0};
  check(dso_cache_rotate(c.c, k, &r, nullptr, 0, table, 32, 100, -9) == 0 &&
            dso_cache_read(k, 0, table, 32, key.data(), value.data()) == 0,
        "%s", dso_last_error());
  for (size_t t = 0; t < 32; ++t)
    for (size_t i = 0; i < 16; ++i) {
      const float got = key[t * 16 + i];
      if (t == 1 || t == 2)
        check(type < DSO_KV_INT8 || std::isnan(got), "%s %s: %g of a token with NaN", v.name.c_str(), kv_name(type), got);
      else
        check(t == 3 ? got == 0 : std::isfinite(got), "%s %s: token %zu is %g", v.name.c_str(), kv_name(type), t, got);
    }
  check(!std::isfinite(key[16 + 3]) && !std::isfinite(key[2 * 16 + 5]), "%s %s: a NaN was lost", v.name.c_str(), kv_name(type));
  dso_cache_destroy(k);
}

// A block is rotated as a whole, and its summary is recomputed, also if it contains tokens after the last.
void summaries_follow(const Variant& v, int type, Random& random) {
  const int32_t table[] = {1, 0};
  dso_cache cache(*v.kernels, {type, 1, 1, 16, 0, 0, 0, 1, nullptr}, 2);
  const KvView view = cache.view(0, table);
  const std::vector<float> x = normal(64 * 16, 1, random), f = frequencies(16, 100);
  for (int64_t start : {0, 32})
    v.kernels->kv_write(cache.layout(0), view, start, 32, x.data() + start * 16, 64, x.data(), 64, 0, 1);
  auto summarize = [&] {
    for (int64_t block : {0, 1}) v.kernels->kv_summarize(cache.layout(0), view, block);
    return std::vector<uint8_t>(cache.summaries.data(), cache.summaries.data() + cache.group_bytes());
  };
  const std::vector<uint8_t> before = summarize();
  OwnContext c(*v.kernels, 2);
  const dso_rotation key = {f.data(), 16, 0, 0, 0};
  check(dso_cache_rotate(c.c, &cache, &key, nullptr, 0, table, 40, 100, -64) == 0, "%s", dso_last_error());
  const std::vector<uint8_t> after(cache.summaries.data(), cache.summaries.data() + cache.group_bytes());
  check(after != before && after == summarize(), "%s %s: summaries are not those of the rotated keys", v.name.c_str(),
        kv_name(type));
}

void refusals(const Variant& v, Random& random) {
  Case full(v, DSO_KV_BF16, 2, {16, 16, 0, false}, 0, {0, 0, 0, false}, 100, random),
      latent(v, DSO_KV_INT8, 0, {8, 8, 0, true}, 40, {12, 8, 0, false}, 100, random);
  OwnContext c(*v.kernels, 1);
  const std::vector<uint8_t> a = bytes_of(*full.cache), b = bytes_of(*latent.cache);
  auto refuses = [&](const char* words, Case& at, dso_rotation key, const dso_rotation* index, const int32_t* table, int tokens,
                     int position, int delta) {
    const int32_t rc = dso_cache_rotate(c.c, at.cache, &key, index, 0, table, tokens, position, delta);
    check(rc == DSO_EINVAL && strstr(dso_last_error(), words), "code %d, \"%s\" (expected \"%s\")", rc, dso_last_error(),
          words);
  };
  const dso_rotation good = rotation(full.key, full.f), turning = rotation(latent.key, latent.f),
                     index = rotation(latent.index, latent.g);
  auto with = [](dso_rotation r, int rot, int offset, int flags = 0) {
    return dso_rotation{r.inv_freq, rot, offset, flags, 0};
  };
  for (auto bad : {with(good, 15, 0), with(good, 0, 0), with(good, 16, 2), with(good, 8, -2), with(good, INT32_MAX - 1, 2)})
    refuses("cannot be rotated in pairs", full, bad, nullptr, full.table, 75, 40, -1);
  refuses("flags are 3", full, with(good, 16, 0, 3), nullptr, full.table, 75, 40, -1);
  refuses("inv_freq is NULL", full, {nullptr, 16, 0, 0, 0}, nullptr, full.table, 75, 40, -1);
  std::vector<float> wild = full.f;
  wild[3] = INFINITY;
  refuses("inv_freq[3] is inf", full, {wild.data(), 16, 0, 0, 0}, nullptr, full.table, 75, 40, -1);
  refuses("index is given", full, good, &index, full.table, 75, 40, -1);
  refuses("index is NULL", latent, turning, nullptr, latent.table, 75, 40, -1);
  const dso_rotation wide = with(index, 14, 0);
  refuses("index: elements", latent, turning, &wide, latent.table, 75, 40, -1);
  const int32_t far[] = {4, 6, 3}, twice[] = {4, 1, 4};
  refuses("block_table[1] is 6", full, good, nullptr, far, 75, 40, -1);
  refuses("block 4 occurs twice", full, good, nullptr, twice, 75, 40, -1);
  refuses("block_table is NULL", full, good, nullptr, nullptr, 75, 40, -1);
  refuses("-1 tokens", full, good, nullptr, full.table, -1, 40, -1);
  refuses("cannot move by -41", full, good, nullptr, full.table, 75, 40, -41);
  refuses("cannot move by 1", full, good, nullptr, full.table, 75, INT32_MAX - 75, 1);
  check(dso_cache_rotate(c.c, full.cache, nullptr, nullptr, 0, full.table, 75, 40, -1) == DSO_EINVAL &&
            strstr(dso_last_error(), "key is NULL"),
        "%s", dso_last_error());
  check(dso_cache_rotate(c.c, full.cache, &good, nullptr, 0, nullptr, 0, 40, -1) == 0, "no tokens: %s", dso_last_error());
  check(dso_cache_rotate(c.c, full.cache, &good, nullptr, 1, full.table, 75, 40, -1) == DSO_EINVAL &&
            strstr(dso_last_error(), "group 1 does not exist"),
        "%s", dso_last_error());
  check(bytes_of(*full.cache) == a && bytes_of(*latent.cache) == b, "a rejected rotation changed bytes");
}

}  // namespace

int main() {
  Random random(3);
  for (const Variant& v : vector_variants()) {
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (bool interleaved : {false, true}) {
        for (int d : {2, 18, 20, 64, 128, 256})
          one_turn(v, type, 1 + random.below(3), {d, d, 0, interleaved}, 0, {0, 0, 0, false}, random);
        one_turn(v, type, 2, {40, 22, 6, interleaved}, 0, {0, 0, 0, false}, random);  // a part of each head
        for (int rope : {2, 12, 64}) {
          one_turn(v, type, 0, {rope, rope, 0, interleaved}, 40, {0, 0, 0, false}, random);
          one_turn(v, type, 0, {rope, rope, 0, interleaved}, 300, {24 + rope, rope, 10, !interleaved}, random);
        }
      }
      special_values(v, type, random);
      summaries_follow(v, type, random);
    }
    drifts(v, random);
    refusals(v, random);
  }
  return report("test_rotate");
}
