// Attention on every variant against softmax(scale q K^T) V in double over the cache's content. A row's bits must depend only
// on its q and the tokens it sees: not on its task, other rows or the cache's other slots.
#include <algorithm>
#include <numbers>

#include "int4_rows.hpp"
#include "kv_fixture.hpp"

enum class Family { decode, prefill, eager };
static const char* family_name(Family f) { return f == Family::decode ? "decode" : f == Family::prefill ? "prefill" : "eager"; }

struct Case {
  int32_t type, kv_heads, group, head_dim;
  int64_t ctx, rows, window;
  float scale, magnitude;        // of q
  int64_t sinks = 0, top_k = 0;  // top_k: each row and kv head sees at most this many blocks, drawn by the test
  float softcap = 0;
  bool head_sinks = false;  // a further logit per head
  bool chunked = false;     // the window is the chunk that the row's token lies in
  int64_t newest = 0;       // tokens that are read from a copy in INT8
};

struct Setup {
  const Variant& variant;
  Case c;
  Cache cache, copied;
  std::vector<float> q;           // [rows, heads * head_dim]
  std::vector<float> head_sinks;  // [heads], or empty
  Buffer scratch;
  const int64_t first;                       // token of row 0, whichever row of its step it is
  std::vector<std::vector<int32_t>> chosen;  // blocks, by row and kv head

  Setup(const Variant& v, const Case& c, Random& random)
      : variant(v),
        c(c),
        cache(*v.kernels, c.type, c.kv_heads, c.head_dim, c.ctx + c.rows + random.below(40) + 32, random),
        copied(*v.kernels, DSO_KV_INT8, c.kv_heads, c.head_dim, c.newest ? c.ctx + c.rows + 32 : 32, random),
        q(normal((size_t)(c.rows * width()), c.magnitude, random)),
        head_sinks(normal(c.head_sinks ? (size_t)heads() : 0, 3, random)),
        scratch(v.kernels->attn_scratch, 0xff),
        first(c.ctx) {
    const int64_t n = c.ctx + c.rows;
    const std::vector<float> k = normal((size_t)(n * cache.width()), 1, random),
                             val = normal((size_t)(n * cache.width()), 1, random);
    for (int64_t t = 0; t < n;) {
      const int64_t piece = std::min<int64_t>(n - t, 1 + random.below(90));
      write(t, piece, k.data() + t * cache.width(), val.data() + t * cache.width());
      t += piece;
    }
    draw(random);
  }
  void write(int64_t t, int64_t n, const float* k, const float* val) {
    cache.write(t, n, k, val);
    if (c.newest > 0) copied.write(t, n, k, val);
  }
  void draw(Random& random) {
    chosen.clear();
    for (int64_t r = 0; r < c.rows; ++r)
      for (int64_t h = 0; h < c.kv_heads; ++h) chosen.push_back(draw_blocks((c.ctx + r) / 32, random));
  }
  // top_k of blocks [0, last], ascending; usually including the last.
  std::vector<int32_t> draw_blocks(int64_t last, Random& random) const {
    std::vector<int32_t> blocks;
    for (int32_t b = 0; b <= last; ++b) blocks.push_back(b);
    if (last + 1 <= c.top_k) return blocks;
    random.shuffle(blocks);
    blocks.resize((size_t)c.top_k);
    if (random.below(4)) blocks[0] = (int32_t)last;
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    return blocks;
  }
  const std::vector<int32_t>& blocks_of(int64_t row, int64_t kv_head) const {
    return chosen[(size_t)((c.ctx + row - first) * c.kv_heads + kv_head)];
  }
  VisibleTokens sight(int64_t row, int64_t kv_head) const {
    if (c.top_k == 0) return {c.window, c.sinks, nullptr, 0, c.chunked};
    const std::vector<int32_t>& blocks = blocks_of(row, kv_head);
    return {0, 0, blocks.data(), (int64_t)blocks.size()};
  }
  bool sees(int64_t row, int64_t kv_head, int64_t token) const {
    if (token >= end(row)) return false;
    if (c.top_k == 0) return token >= begin(row) || token < c.sinks;
    const std::vector<int32_t>& blocks = blocks_of(row, kv_head);
    return std::binary_search(blocks.begin(), blocks.end(), (int32_t)(token / 32));
  }
  bool from_copy(int64_t row, int64_t token) const { return token >= std::max(begin(row), end(row) - c.newest); }
  // The table of the cache, or of the copy, without the blocks that rows [r0, r1) do not see: these are missing, or full of
  // NaN.
  std::vector<int32_t> holed(int64_t kv_head, int64_t r0, int64_t r1, bool of_copy = false) const {
    std::vector<int32_t> table = of_copy ? copied.table : cache.table;
    for (size_t b = 0; b < table.size(); ++b) {
      bool seen = false;
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t t = 32 * (int64_t)b; t < 32 * ((int64_t)b + 1); ++t)
          seen = seen || (sees(r, kv_head, t) && (!of_copy || from_copy(r, t)));
      if (!seen) table[b] = b % 2 ? -1 : table.back();
    }
    return table;
  }
  int64_t heads() const { return (int64_t)c.kv_heads * c.group; }
  int64_t width() const { return heads() * c.head_dim; }
  int64_t begin(int64_t row) const {
    if (c.chunked) return (c.ctx + row) / c.window * c.window;
    return c.window ? std::max<int64_t>(0, c.ctx + row + 1 - c.window) : 0;
  }
  int64_t end(int64_t row) const { return c.ctx + row + 1; }

  // Rows [r0, r1) of a family as one task per kv head; out is [rows, width + 3], of which the last three must not be touched.
  void run(Family family, int64_t r0, int64_t r1, std::vector<float>& out) {
    if (c.top_k > 0 && r1 - r0 > 1) {
      for (int64_t r = r0; r < r1; ++r) run(family, r, r + 1, out);
      return;
    }
    const Kernels& k = *variant.kernels;
    const int64_t d = c.head_dim, stride = width() + 3, row_part = d + 16, chunks = (c.ctx + r1 + attn_chunk - 1) / attn_chunk;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
      const std::vector<int32_t> table = holed(h, r0, r1);
      const KvView view = {cache.view.base, cache.view.block_stride, table.data()};
      const std::vector<int32_t> own = holed(h, r0, r1, true);
      const CacheCopy newest = {copied.layout, {copied.view.base, copied.view.block_stride, own.data()}, c.newest};
      const CacheCopy* copy = c.newest > 0 ? &newest : nullptr;
      VisibleTokens seen = sight(r0, h);
      const float* first_q = q.data() + h * c.group * d;
      float* o = out.data() + h * c.group * d;
      if (family == Family::prefill) {
        k.attn_prefill(cache.layout, view, h, first_q, width() * 4, c.group, r0, r1, c.ctx, seen, scores(h * c.group), copy, o,
                       stride * 4, scratch.get());
      } else if (family == Family::decode) {
        const int64_t chunk_part = (r1 - r0) * c.group * row_part;
        const int64_t parts = copy ? 2 * chunks : chunks;  // then those of the copy
        Buffer part((size_t)(parts * chunk_part) * 4, 0xff);
        float* p = (float*)part.get();
        seen.newest = c.newest;
        for (int64_t i = 0; i < parts; ++i) {
          seen.copied = i >= chunks;
          k.attn_decode_chunk(seen.copied ? copied.layout : cache.layout, seen.copied ? newest.view : view, h, first_q,
                              width() * 4, c.group, r0, r1, c.ctx, seen, scores(h * c.group), i % chunks, p + i * chunk_part,
                              scratch.get());
        }
        for (int64_t i = 0; i < (r1 - r0) * c.group; ++i)
          k.attn_merge(p + i * row_part, chunk_part, parts, d, scores(h * c.group + i % c.group).sinks,
                       o + (r0 + i / c.group) * stride + i % c.group * d);
      } else {
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t g = 0; g < c.group; ++g) {
            Buffer row((size_t)end(r) * 4, 0xff);
            k.attn_eager(cache.layout, view, h, first_q + r * width() + g * d, end(r), begin(r), scores(h * c.group + g), copy,
                         (float*)row.get(), o + r * stride + g * d);
          }
      }
    }
  }
  Scores scores(int64_t head) const { return {c.scale, c.softcap, c.head_sinks ? head_sinks.data() + head : nullptr}; }
  std::vector<float> empty() const { return std::vector<float>((size_t)(c.rows * (width() + 3)), -77.0f); }
};

// Tasks as the runtime forms them: up to attn_rows rows of prefill, up to 16 of decode.
static std::vector<float> in_tasks(Setup& s, Family family, Random& random) {
  std::vector<float> out = s.empty();
  const int64_t most = family == Family::decode ? 16 : attn_rows;
  for (int64_t r = 0; r < s.c.rows;) {
    const int64_t n = std::min<int64_t>(s.c.rows - r, random.below(2) ? most : 1 + random.below((int)most));
    s.run(family, r, r + n, out);
    r += n;
  }
  return out;
}

static bool rounds_to_bf16(const Setup& s, Family f) {  // families that round q and the weights
  const bool has_dot = has_dot_bf16(s.variant.name);
  return has_dot && s.c.type != DSO_KV_F32 && f != Family::eager;
}

static void against_reference(Setup& s, Family family, const std::vector<float>& out) {
  const Case& c = s.c;
  const int64_t d = c.head_dim, tokens = s.cache.tokens;
  std::vector<float> k, v, new_k, new_v;
  s.cache.read(k, v);
  s.copied.read(new_k, new_v);
  const bool rounded = rounds_to_bf16(s, family), transformed = c.type == DSO_KV_INT4;  // rounds transformed rows
  if (transformed)
    for (int64_t at = 0; at < (int64_t)k.size(); at += d)
      for (std::vector<float>* x : {&k, &v}) hadamard(x->data() + at, d, false);
  std::vector<double> logit, value((size_t)d), new_value((size_t)d);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t h = 0; h < s.heads(); ++h) {
      const std::vector<float> new_q(s.q.data() + r * s.width() + h * d, s.q.data() + r * s.width() + (h + 1) * d);
      std::vector<float> old_q = new_q;
      if (transformed) hadamard(old_q.data(), d, true);
      const float* keys = k.data() + h / c.group * tokens * d;
      const float* values = v.data() + h / c.group * tokens * d;
      const float* new_keys = new_k.data() + h / c.group * s.copied.tokens * d;
      const float* new_values = new_v.data() + h / c.group * s.copied.tokens * d;
      const double sink = c.head_sinks ? s.head_sinks[(size_t)h] : -INFINITY;
      double top = sink, size = c.softcap, total = 0, largest = 0;
      logit.clear();
      std::vector<int64_t> seen;
      for (int64_t t = 0; t < s.end(r); ++t)
        if (s.sees(r, h / c.group, t)) seen.push_back(t);
      for (int64_t t : seen) {
        const bool copy = s.from_copy(r, t);
        const std::vector<float>& q = copy ? new_q : old_q;
        const float *key = (copy ? new_keys : keys) + t * d, *its_value = (copy ? new_values : values) + t * d;
        double x = 0, a = 0;
        for (int64_t i = 0; i < d; ++i) {
          double qi = (double)q[(size_t)i] * c.scale;
          if (rounded) {  // q in units of log 2, nearest even in bf16
            const uint32_t u = to_bits(q[(size_t)i] * (c.scale * 1.44269504f));
            qi = (double)from_bits((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u) * std::numbers::ln2;
          }
          x += qi * key[i];
          a += std::fabs(qi * key[i]);
          largest = std::max(largest, (double)std::fabs(its_value[i]));
        }
        if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
        logit.push_back(x);
        top = std::max(top, x);
        size = std::max(size, a);
      }
      std::fill(value.begin(), value.end(), 0.0);
      std::fill(new_value.begin(), new_value.end(), 0.0);
      if (c.head_sinks) total = std::exp(sink - top);
      for (size_t j = 0; j < logit.size(); ++j) {
        const double p = std::exp(logit[j] - top);
        total += p;
        for (int64_t i = 0; i < d; ++i)
          if (s.from_copy(r, seen[j]))
            new_value[(size_t)i] += p * new_values[seen[j] * d + i];
          else
            value[(size_t)i] += p * values[seen[j] * d + i];
      }
      if (transformed) hadamard(value.data(), d, true);
      for (int64_t i = 0; i < d; ++i) value[(size_t)i] = (value[(size_t)i] + new_value[(size_t)i]) / total;
      // A logit is off by less than 4 ulp of the sum of its terms' sizes; bf16 weights by 2^-9 each. Transforms there and back
      // add an ulp per step.
      const double ulps = transformed ? 24 : 4;
      const double bound = largest * (1e-6 + ulps * 6e-8 * 2 * size + (rounded ? 0x1p-8 : 0));
      const float* got = out.data() + r * (s.width() + 3) + h * d;
      for (int64_t i = 0; i < d; ++i)
        if (!check(std::fabs(got[i] - value[(size_t)i]) <= bound,
                   "%s %s %s: d=%ld group=%d kv_heads=%d ctx=%ld window=%ld sinks=%ld top_k=%ld newest=%ld softcap=%g head "
                   "sinks=%d row %ld/%ld "
                   "head %ld [%ld]: "
                   "%.7g, not %.7g (bound %.2g)",
                   s.variant.name.c_str(), kv_name(c.type), family_name(family), (long)d, c.group, c.kv_heads, (long)c.ctx,
                   (long)c.window, (long)c.sinks, (long)c.top_k, (long)c.newest, c.softcap, c.head_sinks, (long)r, (long)c.rows,
                   (long)h, (long)i, got[i], value[(size_t)i], bound))
          return;
    }
  for (int64_t r = 0; r < c.rows; ++r)
    for (int i = 0; i < 3; ++i)
      check(out[(size_t)(r * (s.width() + 3) + s.width() + i)] == -77.0f, "%s %s wrote past row %ld", s.variant.name.c_str(),
            family_name(family), (long)r);
}

static void equal_bits(const Setup& s, Family f, const std::vector<float>& a, const std::vector<float>& b, int64_t rows,
                       const char* what) {
  const size_t row = (size_t)s.width() + 3;
  for (int64_t r = 0; r < rows; ++r)
    check(!memcmp(a.data() + (size_t)r * row, b.data() + (size_t)r * row, row * 4),
          "%s %s %s: d=%d group=%d ctx=%ld window=%ld sinks=%ld top_k=%ld rows=%ld: row %ld differs %s", s.variant.name.c_str(),
          kv_name(s.c.type), family_name(f), s.c.head_dim, s.c.group, (long)s.c.ctx, (long)s.c.window, (long)s.c.sinks,
          (long)s.c.top_k, (long)s.c.rows, (long)r, what);
}

static void all_families(const Variant& v, Case c, Random& random) {
  if (!random.below(4)) c.softcap = 1 + 50 * (float)random.uniform();
  c.head_sinks = !random.below(4);
  Setup s(v, c, random);
  for (Family f : {Family::decode, Family::prefill, Family::eager}) {
    if (f == Family::eager && (c.sinks > 0 || c.top_k > 0)) continue;  // not supported by this family
    const std::vector<float> out = in_tasks(s, f, random);
    against_reference(s, f, out);
    if (f == Family::eager) continue;

    std::vector<float> alone = s.empty();
    for (int64_t r = 0; r < c.rows; ++r) s.run(f, r, r + 1, alone);
    equal_bits(s, f, out, alone, c.rows, "alone");

    const int64_t cut = random.below((int)c.rows);  // a later step: rows [cut, rows) as rows 0.. of a longer context
    std::vector<float> later = out;
    const std::vector<float> q = s.q;
    s.q.assign(q.begin() + cut * s.width(), q.end());
    s.c.ctx += cut;
    s.c.rows -= cut;
    const std::vector<float> second = in_tasks(s, f, random);
    s.q = q;
    s.c = c;
    std::copy(second.begin(), second.end(), later.begin() + cut * (s.width() + 3));
    equal_bits(s, f, out, later, c.rows, "in another step");

    // Hidden tokens may hold anything: the last quarter of the rows is filled with NaN.
    const int64_t clean = c.rows - (c.rows + 3) / 4;
    const std::vector<uint8_t> before(s.cache.memory.get(), s.cache.memory.get() + s.cache.memory.size());
    const std::vector<uint8_t> copy_before(s.copied.memory.get(), s.copied.memory.get() + s.copied.memory.size());
    for (int64_t t = c.ctx + clean; t < c.ctx + c.rows; ++t) {
      std::vector<float> k = normal((size_t)s.cache.width(), 1, random), val = k;
      val[(size_t)random.below((int)val.size())] = random.below(2) ? NAN : INFINITY;
      k[(size_t)random.below((int)k.size())] = NAN;
      s.write(t, 1, k.data(), val.data());
    }
    equal_bits(s, f, out, in_tasks(s, f, random), clean, "with a NaN in hidden tokens");
    memcpy(s.cache.memory.get(), before.data(), before.size());
    memcpy(s.copied.memory.get(), copy_before.data(), copy_before.size());
  }
}

// The kernel splits heads and rows that exceed one pass.
static void many_heads(const Variant& v, int32_t type, Random& random) {
  for (int32_t group : {65, 71, 130, 600}) all_families(v, {type, 1, group, 8, 40, group > 200 ? 1 : 5, 0, 0.3f, 1.0f}, random);
}

// A window, or chosen blocks, that cover the whole cache give the bits of full attention.
static void covers_all(const Variant& v, Case c, Random& random) {
  c.window = c.sinks = c.top_k = 0;
  Setup s(v, c, random);
  for (Family f : {Family::decode, Family::prefill}) {
    const std::vector<float> full = in_tasks(s, f, random);
    s.c.window = c.ctx + c.rows + random.below(3);
    equal_bits(s, f, full, in_tasks(s, f, random), c.rows, "under a wide window");
    s.c.window = 1 + random.below((int)(c.ctx + c.rows));
    s.c.sinks = c.ctx + c.rows - s.c.window;
    equal_bits(s, f, full, in_tasks(s, f, random), c.rows, "where window and sinks meet");
    s.c = c;
    s.c.top_k = (c.ctx + c.rows + 31) / 32;
    s.draw(random);
    equal_bits(s, f, full, in_tasks(s, f, random), c.rows, "over all blocks");
    s.c = c;
  }
}

// A chunk without visible tokens has no weight.
static void empty_chunk(const Variant& v, Random& random) {
  Setup s(v, {DSO_KV_BF16, 1, 2, 64, 600, 1, 50, 0.125f, 1.0f}, random);
  Buffer part(2 * 80 * 4, 0xff);
  const float* p = (const float*)part.get();
  v.kernels->attn_decode_chunk(s.cache.layout, s.cache.view, 0, s.q.data(), s.width() * 4, 2, 0, 1, 600, VisibleTokens{50, 0},
                               Scores{0.125f}, 0, (float*)part.get(), s.scratch.get());
  for (int h = 0; h < 2; ++h) {
    check(p[h * 80] == -INFINITY && p[h * 80 + 1] == 0, "%s: m, l of an empty chunk are %g, %g", v.name.c_str(), p[h * 80],
          p[h * 80 + 1]);
    for (int i = 0; i < 64; ++i) check(p[h * 80 + 16 + i] == 0, "%s: o of an empty chunk is not 0", v.name.c_str());
  }
}

int main() {
  Random random(2);
  for (const Variant& v : vector_variants()) {
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int i = 0; i < rounds(16); ++i) {
        const int32_t dims[] = {2, 16, 30, 40, 64, 80, 96, 128, 256, 400, 512, 2 * (1 + random.below(128))};
        const int32_t d = dims[random.below(12)];
        const int64_t ctx = random.below(3) ? random.below(700) : random.below(40),
                      window = random.below(3) ? 0 : 1 + random.below(random.below(2) ? 40 : 500);
        const float magnitude = i % 8 == 6 ? 80 : i % 8 == 7 ? 1e4f : 1.0f;  // logits of about that size
        all_families(v,
                     {type, 1 + random.below(2), 1 + random.below(12), d, ctx, 1 + random.below(random.below(2) ? 70 : 6),
                      window, 1.0f / std::sqrt((float)d), magnitude},
                     random);
      }
    }
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      // Each window with each number of sinks; with a divisor a quarter of the pairs, other ones for each type.
      const int64_t windows[] = {1, 31, 32, 33, 300}, sink_counts[] = {0, 1, 32, 33, 270};
      for (int pair = type % every(4); pair < 25; pair += every(4)) {
        const int64_t window = windows[pair / 5], sinks = sink_counts[pair % 5];
        const int64_t ctx = random.below(3) ? 280 + random.below(700) : random.below(100);
        const Case c = {type,
                        1 + random.below(2),
                        1 + random.below(8),
                        2 * (1 + random.below(40)),
                        ctx,
                        1 + random.below(random.below(2) ? 70 : 4),
                        window,
                        0.2f,
                        1.0f,
                        sinks};
        all_families(v, c, random);
        Case copied = c;
        copied.newest = 1 + random.below(random.below(2) ? 50 : 600);
        if (random.below(3) == 0) copied.window = copied.sinks = 0;
        if (type != DSO_KV_F32) all_families(v, copied, random);  // q is rounded for both caches, or for neither
        if (sinks > 0) continue;
        Case chunks = c;
        chunks.newest = type == DSO_KV_F32 || random.below(2) ? 0 : 1 + random.below(100);
        chunks.chunked = true;
        all_families(v, chunks, random);
      }
      for (int i = 0; i < rounds(12); ++i) {
        const int64_t ctx = random.below(1500);
        const Case c = {type,
                        1 + random.below(2),
                        1 + random.below(8),
                        2 * (1 + random.below(60)),
                        ctx,
                        1 + random.below(10),
                        0,
                        0.2f,
                        1.0f,
                        0,
                        1 + random.below(30)};
        all_families(v, c, random);
        covers_all(v, c, random);
      }
    }
    many_heads(v, DSO_KV_BF16, random);
    many_heads(v, DSO_KV_INT4, random);
    all_families(v, {DSO_KV_INT4, 2, 130, 8, 300, 5, 0, 0.3f, 1.0f, 0, 0, 0, false, false, 64}, random);
    all_families(v, {DSO_KV_INT4, 1, 9, 64, 700, 70, 0, 0.125f, 1.0f, 0, 0, 0, false, false, 128}, random);
    empty_chunk(v, random);
  }
  return report("test_attention");
}
