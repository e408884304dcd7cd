// Multi-head latent attention's kernels on every variant: latents to the cache and back, and absorbed attention against
// softmax(scale q K^T) V in double over the cache's content. A head's bits must depend only on its q and the tokens it sees.
#include <numbers>

#include "int4_rows.hpp"
#include "latent_fixture.hpp"

static void writing(const Variant& v, const KvLayout& l, Random& random) {
  LatentCache c(*v.kernels, l, 80, random);
  const int64_t width = c.width(), start = random.below(40), n = 1 + random.below(40);
  std::vector<float> x = normal((size_t)(n * width), 3, random);
  const std::vector<uint8_t> before(c.memory.get(), c.memory.get() + c.memory.size());
  c.write(start, x);
  const std::vector<float> got = c.read();
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < width; ++i) {
      const float given = x[(size_t)(t * width + i)], found = got[(size_t)((start + t) * width + i)];
      const int64_t part = i < l.rank ? 0 : l.rank, begin = part + (i - part) / 128 * 128,  // its group
          end = std::min<int64_t>(i < l.rank ? l.rank : width, begin + 128);
      float largest = 0;
      for (int64_t j = begin; j < end; ++j) largest = std::max(largest, std::fabs(x[(size_t)(t * width + j)]));
      const bool int8 = l.type == (i < l.rank ? DSO_KV_INT8 : DSO_KV_INT4), int4 = l.type == DSO_KV_INT4 && i < l.rank;
      const bool right = int4   ? same(found, int4_stored(x.data() + t * width + begin, end - begin)[(size_t)(i - begin)])
                         : int8 ? std::fabs(found - given) <= largest / 127 * 0.5001f
                                : same(found, l.type == DSO_KV_F32 ? given : rounded_bf16(given));
      if (!check(right, "%s %s rank=%d rope=%d: token %ld [%ld] is %g, not %g", v.name.c_str(), kv_name(l.type), l.rank, l.rope,
                 (long)(start + t), (long)i, found, given))
        return;
    }
  // Only the rows were touched.
  for (int64_t b = 0; b < (int64_t)c.table.size(); ++b)
    for (int64_t i = 0; i < l.layer_bytes; ++i) {
      const int64_t token = b * 32 + i / l.row_bytes, at = c.table[(size_t)b] * l.layer_bytes + i;
      if (i < 32 * l.row_bytes && token >= start && token < start + n) continue;
      if (!check(c.memory[(size_t)at] == before[(size_t)at], "%s %s: byte %ld of block %ld was overwritten", v.name.c_str(),
                 kv_name(l.type), (long)i, (long)b))
        return;
    }
  // A NaN makes its group NaN, or only its element.
  x.assign((size_t)width, 1.0f);
  x[0] = NAN;
  c.write(start, x);
  check(std::isnan(c.read()[(size_t)(start * width)]), "%s %s: a NaN was lost", v.name.c_str(), kv_name(l.type));
}

// The index keys after the latents, as written by INDEX_WRITE.
static void reading_index(const Variant& v, int type, Random& random) {
  LatentCache c(*v.kernels, LatentCache::shape(type, 30, 6, 10), 70, random);
  c.write(0, normal((size_t)(70 * c.width()), 1, random));
  std::vector<float> keys = normal(70 * 10, 1, random), latents((size_t)(70 * c.width())), got(70 * 10);
  for (int64_t t = 0; t < 70; ++t)
    for (int64_t i = 0; i < 10; ++i) {
      uint8_t* row = c.memory.get() + c.table[(size_t)t / 32] * c.layout.layer_bytes + 32 * c.layout.row_bytes +
                     t % 32 * c.layout.index_bytes;
      float& key = keys[(size_t)(t * 10 + i)];
      if (type != DSO_KV_F32) key = rounded_bf16(key);
      const uint32_t bits = to_bits(key);
      if (type == DSO_KV_F32)
        memcpy(row + 4 * i, &bits, 4);
      else
        memcpy(row + 2 * i, (const char*)&bits + 2, 2);
    }
  v.kernels->latent_read(c.layout, c.view, 70, latents.data(), got.data());
  check(got == keys, "%s %s: index keys", v.name.c_str(), kv_name(type));
  check(latents == c.read(), "%s %s: latents changed by index keys", v.name.c_str(), kv_name(type));
}

struct Setup {
  const Variant& variant;
  LatentCache cache;
  int64_t heads;
  float scale;
  std::vector<float> q;  // [heads, rank + rope]
  Buffer scratch, packed;

  Setup(const Variant& v, const KvLayout& l, int64_t tokens, int64_t heads, float magnitude, Random& random)
      : variant(v),
        cache(*v.kernels, l, tokens + random.below(40), random),
        heads(heads),
        scale(0.13f),
        q(normal((size_t)(heads * (l.rank + l.rope)), magnitude, random)),
        scratch((size_t)v.kernels->mla_scratch(l), 0xff),
        packed((size_t)v.kernels->mla_query_bytes(l), 0xff) {
    cache.write(0, normal((size_t)(tokens * cache.width()), 1, random));
  }
  const KvLayout& layout() const { return cache.layout; }
  int64_t part_floats() const { return layout().rank + 16; }

  // Heads [h0, h1) over tokens [begin, seen) of those given, [from, given) or of a list; out: [h1 - h0, rank].
  std::vector<float> run(int64_t h0, int64_t h1, const std::vector<int32_t>* chosen, int64_t seen, int64_t given,
                         int64_t begin = 0, int64_t from = 0) {
    const Kernels& k = *variant.kernels;
    const int64_t chunks = (given + attn_chunk - 1) / attn_chunk, n = h1 - h0;
    k.mla_query(layout(), q.data() + h0 * cache.width(), n, scale, packed.get());
    Buffer part((size_t)(chunks * n * part_floats()) * 4, 0xff);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t last = std::min((c + 1) * attn_chunk, given), first = std::min(last, std::max(from, c * attn_chunk));
      k.mla_tokens(layout(), cache.view, chosen ? chosen->data() + first : nullptr, first, last - first, scratch.get());
      k.mla_attend(layout(), packed.get(), n, std::max<int64_t>(0, begin - first), std::min(last, seen) - first,
                   (float*)part.get() + c * n * part_floats(), scratch.get());
    }
    std::vector<float> out((size_t)(n * layout().rank));
    for (int64_t h = 0; h < n; ++h)
      k.attn_merge((float*)part.get() + h * part_floats(), n * part_floats(), chunks, layout().rank, nullptr,
                   out.data() + h * layout().rank);
    return out;
  }
  std::vector<float> all(const std::vector<int32_t>* chosen, int64_t seen, int64_t given, int64_t begin = 0, int64_t from = 0) {
    std::vector<float> out;
    for (int64_t h = 0; h < heads; h += mla_heads) {
      const std::vector<float> tile = run(h, std::min(heads, h + mla_heads), chosen, seen, given, begin, from);
      out.insert(out.end(), tile.begin(), tile.end());
    }
    return out;
  }
};

// With INT4, the latent parts of rows are rounded after the transform.
static void transform(const KvLayout& l, float* rows, int64_t count, bool inverse) {
  if (l.type != DSO_KV_INT4) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < l.rank; i += 128)
      hadamard(rows + r * (l.rank + l.rope) + i, std::min<int64_t>(128, l.rank - i), inverse);
}

static void against_reference(Setup& s, const std::vector<float>& out, const std::vector<int32_t>& tokens, const char* what) {
  const KvLayout& l = s.layout();
  const int64_t width = s.cache.width();
  const bool rounded = l.type != DSO_KV_F32;  // q, weights, and what int8 stands for
  std::vector<float> rows = s.cache.read(), queries = s.q;
  transform(l, rows.data(), s.cache.tokens, false);
  transform(l, queries.data(), s.heads, true);
  if (rounded)
    for (float& x : rows) x = rounded_bf16(x);
  for (int64_t h = 0; h < s.heads; ++h) {
    std::vector<double> q((size_t)width), logit, value((size_t)l.rank, 0.0);
    for (int64_t i = 0; i < width; ++i) {
      const float x = queries[(size_t)(h * width + i)] * (s.scale * 1.44269504f);  // in units of log 2
      q[(size_t)i] = (rounded ? rounded_bf16(x) : x) * std::numbers::ln2;
    }
    double top = -INFINITY, size = 0, total = 0, largest = 0;
    for (int32_t t : tokens) {
      double x = 0, a = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double term = q[(size_t)i] * rows[(size_t)(t * width + i)];
        x += term;
        a += std::fabs(term);
      }
      logit.push_back(x);
      top = std::max(top, x);
      size = std::max(size, a);
    }
    for (size_t j = 0; j < tokens.size(); ++j) {
      const double p = std::exp(logit[j] - top);
      total += p;
      for (int64_t i = 0; i < l.rank; ++i) {
        const float x = rows[(size_t)(tokens[j] * width + i)];
        value[(size_t)i] += p * x;
        largest = std::max(largest, (double)std::fabs(x));
      }
    }
    for (double& x : value) x /= total;
    if (l.type == DSO_KV_INT4)
      for (int64_t i = 0; i < l.rank; i += 128) hadamard(value.data() + i, std::min<int64_t>(128, l.rank - i), true);
    // A logit is off by less than 4 ulp of the sum of its terms' sizes; bf16 weights by 2^-9 each.
    const double bound = largest * (2e-6 + 4 * 6e-8 * 2 * size + (rounded ? 0x1p-8 : 0));
    for (int64_t i = 0; i < l.rank; ++i) {
      const float got = out[(size_t)(h * l.rank + i)];
      if (!check(std::fabs(got - value[(size_t)i]) <= bound,
                 "%s %s %s: rank=%d rope=%d heads=%ld tokens=%zu: head %ld [%ld]: %.7g, not %.7g (bound %.2g)",
                 s.variant.name.c_str(), kv_name(l.type), what, l.rank, l.rope, (long)s.heads, tokens.size(), (long)h, (long)i,
                 got, value[(size_t)i], bound))
        return;
    }
  }
}

static void absorbed(const Variant& v, const KvLayout& l, int64_t tokens, int64_t heads, float magnitude, Random& random) {
  Setup s(v, l, tokens, heads, magnitude, random);
  const std::vector<float> out = s.all(nullptr, tokens, tokens);
  std::vector<int32_t> every((size_t)tokens);
  for (size_t i = 0; i < every.size(); ++i) every[i] = (int32_t)i;
  against_reference(s, out, every, "dense");
  auto name = [&] { return v.name + " " + kv_name(l.type); };

  check(s.all(&every, tokens, tokens) == out, "%s: chosen, all of them, differs from dense", name().c_str());
  const int64_t h = random.below((int)heads);  // alone, and thus in another lane
  const std::vector<float> alone = s.run(h, h + 1, nullptr, tokens, tokens);
  check(!memcmp(alone.data(), out.data() + h * l.rank, (size_t)l.rank * 4),
        "%s: heads=%ld rank=%d tokens=%ld: head %ld differs alone", name().c_str(), (long)heads, l.rank, (long)tokens, (long)h);

  std::vector<int32_t> some;  // as an indexer chooses
  for (int32_t t : every)
    if (random.below(3) == 0 || (t + 1 == tokens && some.empty())) some.push_back(t);
  against_reference(s, s.all(&some, (int64_t)some.size(), (int64_t)some.size()), some, "chosen");

  const int64_t begin = random.below((int)tokens);
  const std::vector<int32_t> rest(every.begin() + begin, every.end());
  const std::vector<float> behind = s.all(nullptr, tokens, tokens, begin);
  against_reference(s, behind, rest, "from the middle on");
  const int64_t from = random.below((int)begin + 1);
  check(s.all(nullptr, tokens, tokens, begin, from) == behind,
        "%s: rank=%d tokens=%ld from %ld on: differs if given from %ld on", name().c_str(), l.rank, (long)tokens, (long)begin,
        (long)from);

  // Hidden tokens may hold anything.
  const int64_t seen = 1 + random.below((int)tokens);
  const std::vector<float> prefix = s.all(nullptr, seen, seen);
  std::vector<float> poison((size_t)((tokens - seen) * s.cache.width()));
  for (float& x : poison) x = random.below(2) ? NAN : INFINITY;
  s.cache.write(seen, poison);
  check(s.all(nullptr, seen, tokens) == prefix, "%s: rank=%d: %ld of %ld tokens: hidden tokens change the result",
        name().c_str(), l.rank, (long)seen, (long)tokens);
  memset(s.scratch.get(), 0x7f, s.scratch.size());
  check(s.all(nullptr, seen, seen) == prefix, "%s: what scratch held shows", name().c_str());
}

// AMX: the bits of real tiles are those of emulated ones. Does nothing where a variant does not run.
static void tiles_as_emulated(Random& random) {
  std::vector<Variant> tiles;
  for (const Variant& v : variants())
    if (v.name.starts_with("amx")) tiles.push_back(v);
  if (tiles.size() < 2) return;
  for (int type : {DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4})
    for (int i = 0; i < rounds(30); ++i) {
      const KvLayout l = LatentCache::shape(type, 32 * (1 + random.below(16)), 32 * (1 + random.below(2)), 0);
      const int64_t tokens = 1 + random.below(600), heads = 1 + random.below(40), begin = random.below((int)tokens);
      const uint64_t seed = random.bits();
      std::vector<float> out[2];
      for (int j = 0; j < 2; ++j) {
        Random same(seed);
        Setup s(tiles[(size_t)j], l, tokens, heads, 1.0f, same);
        out[j] = s.all(nullptr, tokens, tokens, begin);
      }
      check(!memcmp(out[0].data(), out[1].data(), out[0].size() * 4), "%s and %s differ: %s rank=%d rope=%d tokens %ld to %ld",
            tiles[0].name.c_str(), tiles[1].name.c_str(), kv_name(type), l.rank, l.rope, (long)begin, (long)tokens);
    }
}

// Chunks folded by groups, then merged: of one group the bits of one merge, of several what doubles make of the parts.
static void folding(const Variant& v, int64_t rank, int64_t chunks, int64_t group, Random& random) {
  const int64_t stride = rank + 16 + random.below(9), groups = (chunks + group - 1) / group;
  std::vector<float> parts = normal((size_t)(chunks * stride), 1, random), folded((size_t)(groups * stride), NAN),
                     once((size_t)rank), twice((size_t)rank);
  for (int64_t c = 0; c < chunks; ++c) {
    float* part = parts.data() + c * stride;
    part[0] *= 10;
    part[1] = std::fabs(part[1]) + 1;
    if (c % 3 == 1 || c / group == 1) {  // saw nothing
      std::fill_n(part, rank + 16, 0.0f);
      part[0] = -INFINITY;
    }
  }
  v.kernels->attn_merge(parts.data(), stride, chunks, rank, nullptr, once.data());
  for (int64_t g = 0; g < groups; ++g)
    v.kernels->attn_fold(parts.data() + g * group * stride, stride, std::min(group, chunks - g * group), rank,
                         folded.data() + g * stride);
  v.kernels->attn_merge(folded.data(), stride, groups, rank, nullptr, twice.data());
  if (groups <= 2)
    check(once == twice, "%s: rank=%ld: %ld chunks, folded where one group of %ld saw anything, differ", v.name.c_str(),
          (long)rank, (long)chunks, (long)groups);
  double top = -INFINITY, total = 0;
  for (int64_t c = 0; c < chunks; ++c) top = std::max(top, (double)parts[(size_t)(c * stride)]);
  std::vector<double> want((size_t)rank);
  for (int64_t c = 0; c < chunks; ++c) {
    const float* part = parts.data() + c * stride;
    const double weight = std::exp2(part[0] - top);
    total += weight * part[1];
    for (int64_t i = 0; i < rank; ++i) want[(size_t)i] += weight * part[16 + i];
  }
  for (int64_t i = 0; i < rank; ++i)
    if (!check(std::fabs(twice[(size_t)i] - want[(size_t)i] / total) <= 1e-5,
               "%s: rank=%ld: %ld chunks in %ld groups [%ld]: %g, not %g", v.name.c_str(), (long)rank, (long)chunks,
               (long)groups, (long)i, twice[(size_t)i], want[(size_t)i] / total))
      return;
}

int main() {
  Random random(5);
  for (const Variant& v : variants_with_own(&Kernels::mla_attend)) {
    for (int i = 0; i < rounds(30); ++i)
      folding(v, 2 * (1 + random.below(150)), 1 + random.below(40), 1 + random.below(20), random);
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int i = 0; i < rounds(12); ++i)
        writing(v, LatentCache::shape(type, 2 * (1 + random.below(200)), 2 * (1 + random.below(32)), 2 * random.below(20)),
                random);
      reading_index(v, type, random);
      const int32_t ranks[] = {32, 2, 30, 34, 64, 96, 128, 130, 200, 256, 512}, heads[] = {1, 3, 16, 20};
      for (int i = 0; i < rounds(22); ++i) {
        const int64_t tokens = i % 3 == 0 ? 1 + random.below(1100) : 1 + random.below(80);
        const float magnitude = i % 8 == 6 ? 30.0f : i % 8 == 7 ? 1e3f : 1.0f;
        const int32_t rope = i % 2 == 0 ? 2 * (1 + random.below(32)) : 32 * (1 + random.below(2));  // the latter fill tiles
        absorbed(v, LatentCache::shape(type, ranks[i % 11], rope, 2 * random.below(3)), tokens, heads[random.below(4)],
                 magnitude, random);
      }
      absorbed(v, LatentCache::shape(type, 512, 64, 128), 300, 128, 1.0f, random);
    }
  }
  tiles_as_emulated(random);
  return report("test_mla");
}
