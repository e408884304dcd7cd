// Expanded latent attention's kernels on every variant: rows of latents for a product, and attention over panels of keys and
// values against doubles. The product between the two is the caller's: here keys and values are random.
#include <algorithm>
#include <numbers>

#include "latent_fixture.hpp"

struct Setup {
  const Variant& variant;
  MlaHead head;
  LatentCache cache;
  int64_t ctx, rows;
  VisibleTokens sight;
  float scale;
  std::vector<float> q, kv;  // [rows, nope + rope], [tokens, nope + v_dim]
  Buffer scratch, panels;

  Setup(const Variant& v, const MlaHead& h, const KvLayout& l, int64_t ctx, int64_t rows, const VisibleTokens& sight,
        float magnitude, Random& random)
      : variant(v),
        head(h),
        cache(*v.kernels, l, ctx + rows, random),
        ctx(ctx),
        rows(rows),
        sight(sight),
        scale(0.2f),
        q(normal((size_t)(rows * k_dim()), magnitude, random)),
        kv(normal((size_t)((ctx + rows) * kv_dim()), 1, random)),
        scratch(v.kernels->attn_scratch, 0xff),
        panels((size_t)v.kernels->mla_panel_bytes(h), 0xff) {
    cache.write(0, normal((size_t)((ctx + rows) * cache.width()), 1, random));
  }
  int64_t k_dim() const { return head.nope + head.rope; }
  int64_t kv_dim() const { return head.nope + head.v_dim; }

  bool sees(int64_t r, int64_t t) const {
    return t <= ctx + r && (sight.window == 0 || ctx + r - t < sight.window || t < sight.sinks);
  }
  bool any_sees(int64_t r0, int64_t r1, int64_t block) const {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t t = block * 32; t < block * 32 + 32; ++t)
        if (sees(r, t)) return true;
    return false;
  }
  // Rows [r0, r1) as one task; out is [rows, v_dim + 3], of which the last three are left alone. Blocks that no row sees have
  // no place.
  void run(int64_t r0, int64_t r1, std::vector<float>& out) {
    const Kernels& k = *variant.kernels;
    const int64_t stride = head.v_dim + 3, end = ctx + r1;
    std::vector<int32_t> table(cache.table);
    for (size_t b = 0; b < table.size(); ++b)
      if (!any_sees(r0, r1, (int64_t)b)) table[b] = INT32_MIN / 2;
    const KvView view = {cache.view.base, cache.view.block_stride, table.data()};
    std::vector<float> m((size_t)(r1 - r0), -INFINITY), sum((size_t)(r1 - r0), 0.0f);
    for (int64_t r = r0; r < r1; ++r) std::fill_n(out.data() + r * stride, head.v_dim, 0.0f);
    for (int64_t first = 0; first < end; first += attn_chunk) {
      memset(panels.get(), 0xff, panels.size());
      bool any = false;
      for (int64_t t = first; t < std::min(first + attn_chunk, end); t += 32) {
        if (!any_sees(r0, r1, t / 32)) continue;
        k.mla_panels(cache.layout, view, head, t, std::min<int64_t>(32, end - t), kv.data() + t * kv_dim(), kv_dim() * 4,
                     panels.get());
        any = true;
      }
      if (any)
        k.mla_expanded(head, panels.get(), first / attn_chunk, q.data(), k_dim() * 4, r0, r1, ctx, sight, scale, m.data(),
                       sum.data(), out.data(), stride * 4, scratch.get());
    }
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t i = 0; i < head.v_dim; ++i) out[(size_t)(r * stride + i)] /= sum[(size_t)(r - r0)];
  }
  std::vector<float> empty() const { return std::vector<float>((size_t)(rows * (head.v_dim + 3)), -77.0f); }
  std::vector<float> in_tasks(Random& random) {
    std::vector<float> out = empty();
    for (int64_t r = 0; r < rows;) {
      const int64_t n = std::min<int64_t>(rows - r, 1 + random.below(40));
      run(r, r + n, out);
      r += n;
    }
    return out;
  }
};

static void against_reference(const Setup& s, const std::vector<float>& out) {
  const MlaHead& h = s.head;
  const bool has_dot = has_dot_bf16(s.variant.name), rounded = !h.single && has_dot;
  const std::vector<float> latents = s.cache.read();
  auto held = [&](float x) { return h.single ? x : rounded_bf16(x); };
  for (int64_t r = 0; r < s.rows; ++r) {
    std::vector<double> logit, value((size_t)h.v_dim, 0.0);
    double top = -INFINITY, size = 0, total = 0, largest = 0;
    std::vector<int64_t> tokens;
    for (int64_t t = 0; t <= s.ctx + r; ++t) {
      if (!s.sees(r, t)) continue;
      tokens.push_back(t);
      double x = 0, a = 0;
      for (int64_t i = 0; i < s.k_dim(); ++i) {
        const float key = held(i < h.nope ? s.kv[(size_t)(t * s.kv_dim() + i)]
                                          : latents[(size_t)(t * s.cache.width() + s.cache.layout.rank + i - h.nope)]);
        const float scaled = s.q[(size_t)(r * s.k_dim() + i)] * (s.scale * 1.44269504f);
        const double term = (rounded ? rounded_bf16(scaled) : scaled) * std::numbers::ln2 * key;
        x += term;
        a += std::fabs(term);
      }
      logit.push_back(x);
      top = std::max(top, x);
      size = std::max(size, a);
    }
    for (size_t t = 0; t < logit.size(); ++t) {
      const double p = std::exp(logit[t] - top);
      total += p;
      for (int64_t i = 0; i < h.v_dim; ++i) {
        const float x = held(s.kv[(size_t)(tokens[t] * s.kv_dim() + h.nope + i)]);
        value[(size_t)i] += p * x;
        largest = std::max(largest, (double)std::fabs(x));
      }
    }
    const double bound = largest * (2e-6 + 4 * 6e-8 * 2 * size + (rounded ? 0x1p-8 : 0));  // as in test_attention
    const float* got = out.data() + r * (h.v_dim + 3);
    for (int64_t i = 0; i < h.v_dim; ++i)
      if (!check(std::fabs(got[i] - value[(size_t)i] / total) <= bound,
                 "%s %s %s nope=%ld rope=%ld v_dim=%ld window=%ld sinks=%ld ctx=%ld row %ld/%ld [%ld]: %.7g, not %.7g (bound "
                 "%.2g)",
                 s.variant.name.c_str(), kv_name(s.cache.layout.type), h.single ? "fp32" : "bf16", (long)h.nope, (long)h.rope,
                 (long)h.v_dim, (long)s.sight.window, (long)s.sight.sinks, (long)s.ctx, (long)r, (long)s.rows, (long)i, got[i],
                 value[(size_t)i] / total, bound))
        return;
    for (int64_t i = h.v_dim; i < h.v_dim + 3; ++i)
      check(got[i] == -77.0f, "%s wrote past row %ld", s.variant.name.c_str(), (long)r);
  }
}

static void expanded(const Variant& v, const MlaHead& h, const KvLayout& l, int64_t ctx, int64_t rows,
                     const VisibleTokens& sight, float magnitude, Random& random) {
  Setup s(v, h, l, ctx, rows, sight, magnitude, random);
  const std::vector<float> out = s.in_tasks(random);
  against_reference(s, out);
  std::vector<float> alone = s.empty();
  for (int64_t r = 0; r < rows; ++r) s.run(r, r + 1, alone);
  check(alone == out, "%s %s: ctx=%ld rows=%ld: rows differ alone", v.name.c_str(), kv_name(l.type), (long)ctx, (long)rows);

  if (sight.window > 0 && sight.window + sight.sinks >= ctx + rows) {
    s.sight = {};
    check(s.in_tasks(random) == out, "%s %s: a window that covers all differs from none", v.name.c_str(), kv_name(l.type));
    s.sight = sight;
  }

  // Tokens that a row does not see may hold anything: some of the last quarter's keys and values are NaN or infinite, and so
  // are those between sinks and window.
  const int64_t clean = rows - (rows + 3) / 4;
  for (int64_t t = 0; t < ctx; ++t)
    if (!s.any_sees(0, rows, t / 32) || (!s.sees(0, t) && random.below(2)))
      s.kv[(size_t)(t * s.kv_dim() + random.below((int)s.kv_dim()))] = random.below(2) ? NAN : INFINITY;
  for (int64_t t = ctx + clean; t < ctx + rows; ++t)
    if (t == ctx + clean || random.below(2))
      s.kv[(size_t)(t * s.kv_dim() + random.below((int)s.kv_dim()))] = random.below(2) ? NAN : INFINITY;
  const std::vector<float> beside = s.in_tasks(random);
  check(!memcmp(beside.data(), out.data(), (size_t)(clean * (h.v_dim + 3)) * 4),
        "%s %s: ctx=%ld rows=%ld: what a row does not see shows", v.name.c_str(), kv_name(l.type), (long)ctx, (long)rows);
}

// Rows of latents are what dso_convert makes of the numbers that the cache gives back.
static void rows_of_latents(const Variant& v, const KvLayout& l, Random& random) {
  LatentCache c(*v.kernels, l, 50, random);
  c.write(0, normal((size_t)(50 * c.width()), 2, random));
  const std::vector<float> numbers = c.read();
  std::vector<float> room((size_t)l.rank);
  const int64_t first = random.below(20), n = 1 + random.below(30);
  for (int kind : {DSO_SLOT_F32, DSO_SLOT_BF16, DSO_SLOT_Q16}) {
    const int64_t bytes = (int64_t)::row_bytes(kind, l.rank);
    Buffer rows((size_t)(n * bytes)), expected((size_t)bytes);
    v.kernels->mla_rows(l, c.view, first, n, kind, room.data(), rows.get(), bytes);
    for (int64_t t = 0; t < n; ++t) {
      const float* x = numbers.data() + (first + t) * c.width();
      if (kind == DSO_SLOT_F32)
        memcpy(expected.get(), x, (size_t)l.rank * 4);
      else
        v.kernels->convert(kind, x, 0, l.rank, l.rank, expected.get());
      const size_t used = kind == DSO_SLOT_F32    ? (size_t)l.rank * 4
                          : kind == DSO_SLOT_BF16 ? (size_t)bytes
                                                  : (size_t)(l.rank + 31) / 32 * (64 + 8);
      check(!memcmp(rows.get() + t * bytes, expected.get(), used), "%s %s: latents as rows of kind %d", v.name.c_str(),
            kv_name(l.type), kind);
    }
  }
}

int main() {
  Random random(6);
  for (const Variant& v : variants())
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      rows_of_latents(v, LatentCache::shape(type, 2 * (1 + random.below(100)), 4, 0), random);
      const int64_t dims[][3] = {{128, 64, 128}, {20, 12, 18}, {2, 2, 2}, {6, 2, 40}, {192, 64, 256}, {30, 16, 62}};
      for (int i = 0; i < rounds(24); ++i) {
        const auto& d = dims[i % 6];
        const int64_t ctx = random.below(3) ? random.below(40) : random.below(600),
                      rows = 1 + random.below(random.below(2) ? 70 : 6);
        const float magnitude = i % 8 == 6 ? 20.0f : i % 8 == 7 ? 1e3f : 1.0f;
        VisibleTokens sight;
        if (i % 3 > 0)
          sight = {1 + random.below(i % 3 == 1 ? 60 : 500), random.below(2) ? random.below(50) : random.below(300)};
        expanded(v, {d[0], d[1], d[2], type == DSO_KV_F32 && i % 4 != 0}, LatentCache::shape(type, 34, (int32_t)d[1], 0), ctx,
                 rows, sight, magnitude, random);
      }
    }
  return report("test_mla_expanded");
}
