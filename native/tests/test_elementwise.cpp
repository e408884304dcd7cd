// Element-wise kernels on every variant: against double, bitwise equal on every ISA, any width, nothing written outside.
#include <algorithm>
#include <numbers>

#include "kv_fixture.hpp"

static float* floats(Buffer& b) { return (float*)b.get(); }

// Fills a guarded buffer of exactly n floats.
static void fill(Buffer& b, const std::vector<float>& x) { memcpy(b.get(), x.data(), x.size() * 4); }

struct Inputs {
  std::vector<float> a, b;
};

static std::vector<float> run(const Kernels& k, int op, const Inputs& in, int64_t n, bool in_place) {
  Buffer a((size_t)n * 4), b((size_t)n * 4), out((size_t)n * 4);
  fill(a, in.a);
  fill(b, in.b);
  float* o = in_place ? floats(a) : floats(out);
  if (op == 0) k.rms_norm(floats(a), floats(b), n, 1e-5f, o);
  if (op == 1) k.add(floats(a), floats(b), n, o);
  if (op == 2) k.swiglu(floats(a), floats(b), n, o);
  if (op == 3) k.sigmoid(floats(a), n, o);
  if (op == 4) k.softmax(floats(a), n, o);
  if (op == 5) k.add_scaled(floats(b), 0.7f, n, o = floats(a));
  if (op == 6) k.clamped_swiglu(floats(a), floats(b), n, 1.7f, 0.9f, 1.0f, o);
  return std::vector<float>(o, o + n);
}

static void rows(const std::vector<Variant>& all, int64_t n, float scale, Random& random) {
  const char* names[] = {"rms_norm", "add", "swiglu", "sigmoid", "softmax", "add_scaled", "clamped_swiglu"};
  const Inputs in = {normal((size_t)n, scale, random), normal((size_t)n, 1, random)};
  const double top = *std::max_element(in.a.begin(), in.a.end());
  double square = 0, shares = 0;
  for (float x : in.a) square += (double)x * x, shares += std::exp(x - top);
  for (int op = 0; op < 7; ++op) {
    const std::vector<float> first = run(*all[0].kernels, op, in, n, false);
    for (int64_t i = 0; i < n; ++i) {
      const double a = in.a[(size_t)i], b = in.b[(size_t)i];
      const double wanted[] = {a / std::sqrt(square / (double)n + 1e-5) * b,
                               a + b,
                               a / (1 + std::exp(-a)) * b,
                               1 / (1 + std::exp(-a)),
                               std::exp(a - top) / shares,
                               std::fma(b, 0.7f, a),
                               (std::clamp(b, -double(0.9f), double(0.9f)) + 1) * std::min(a, double(0.9f)) /
                                   (1 + std::exp(-double(1.7f) * std::min(a, double(0.9f))))};
      const double want = wanted[op], size = op == 5 ? std::fabs(a) + std::fabs(b) : std::fabs(want);
      double error = 1e-6;
      if (op == 4) error = 2e-6 + 1e-7 * (top - a);           // a difference that is rounded, then taken to a power
      if (op == 6) error = 1e-6 + 1e-7 * std::fabs(1.7 * a);  // a product, likewise
      if (!check(std::fabs(first[(size_t)i] - want) <= error * size + (op == 6 ? 1e-35 : 1e-37),
                 "%s %s n=%ld [%ld]: %.8g, not %.8g", all[0].name.c_str(), names[op], (long)n, (long)i, first[(size_t)i], want))
        break;
    }
    for (const Variant& v : all)
      for (bool in_place : {false, true})
        check(!memcmp(run(*v.kernels, op, in, n, in_place).data(), first.data(), (size_t)n * 4),
              "%s %s n=%ld%s: not the bits of %s", v.name.c_str(), names[op], (long)n, in_place ? " in place" : "",
              all[0].name.c_str());
  }
}

// Every element-wise op of plans: bitwise equal on every variant, for any width and in place.
static void ops(const std::vector<Variant>& all, int64_t n, Random& random) {
  const std::vector<float> x = normal((size_t)n, 3, random), y = normal((size_t)n, 1, random);
  const Kernels& first = *all[0].kernels;
  for (int64_t i = 0; i < first.elementwise_count; ++i) {
    std::vector<float> expected;
    for (const Variant& v : all)
      for (int into : {0, 1, 2}) {  // a buffer of its own, a, b
        const ElementwiseOp& op = v.kernels->elementwise_ops[i];
        if (into == 2 && op.inputs < 2) continue;
        Buffer a((size_t)n * 4), b((size_t)n * 4), out((size_t)n * 4);
        fill(a, x);
        fill(b, y);
        float* o = floats(into == 0 ? out : into == 1 ? a : b);
        op.row(floats(a), op.inputs < 2 ? nullptr : floats(b), n, 1.7f, o);
        if (expected.empty()) expected.assign(o, o + n);
        check(!memcmp(o, expected.data(), (size_t)n * 4), "%s %s n=%ld into %d: not the bits of %s", v.name.c_str(), op.name,
              (long)n, into, all[0].name.c_str());
      }
  }
}

// The functions of element-wise ops, against double.
static void functions(const Kernels& k, int64_t n, float scale, Random& random) {
  const std::vector<float> x = normal((size_t)n, scale, random), y = normal((size_t)n, 1, random);
  const auto gelu = [](double a) {
    return a / 2 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (a + 0.044715 * a * a * a)));
  };
  const double factor = 1.7f;
  for (int64_t i = 0; i < k.elementwise_count; ++i) {
    const ElementwiseOp& op = k.elementwise_ops[i];
    std::vector<float> out((size_t)n);
    op.row(x.data(), y.data(), n, (float)factor, out.data());
    for (size_t j = 0; j < (size_t)n; ++j) {
      const double a = x[j], b = y[j];
      double want = 0, size = 0;  // size: of which the error is a share
      switch (op.op) {
        case DSO_OP_ADD:
          want = a + b, size = std::fabs(a) + std::fabs(b);
          break;
        case DSO_OP_SWIGLU:
          want = a / (1 + std::exp(-a)) * b;
          break;
        case DSO_OP_GEGLU:
          want = gelu(a) * b, size = std::fabs(a * b);  // for negative a, 1 + tanh is small
          break;
        case DSO_OP_GELU:
          want = gelu(a), size = std::fabs(a);
          break;
        case DSO_OP_GELU_ERF:
          want = a * std::erfc(-a / std::numbers::sqrt2) / 2, size = std::fabs(a);
          break;
        case DSO_OP_SCALE:
          want = factor * a;
          break;
        case DSO_OP_SOFTCAP:
          want = factor * std::tanh(a / factor);
          break;
        default:
          continue;  // compared with the reference backend in tests/backends/cpu
      }
      if (!check(std::fabs(out[j] - want) <= 1e-6 * std::max(size, std::fabs(want)) + 1e-37, "%s(%.8g, %.8g): %.8g, not %.8g",
                 op.name, a, b, out[j], want))
        break;
    }
  }
}

static void rope(const Variant& v, int64_t heads, int64_t head_dim, int64_t offset, int64_t rot, bool interleaved,
                 bool in_place, Random& random) {
  const int64_t n = heads * head_dim, half = rot / 2;
  const std::vector<float> x = normal((size_t)n, 1, random);
  std::vector<float> angles((size_t)rot);
  for (int64_t i = 0; i < half; ++i) {
    const double angle = 100 * random.uniform();
    angles[(size_t)i] = (float)std::cos(angle);
    angles[(size_t)(half + i)] = (float)std::sin(angle);
  }
  Buffer in((size_t)n * 4), table((size_t)rot * 4), out((size_t)n * 4);
  fill(in, x);
  fill(table, angles);
  float* o = in_place ? floats(in) : floats(out);
  v.kernels->rope(floats(in), floats(table), heads, head_dim, offset, rot, interleaved, o);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < head_dim; ++i) {
      float want = x[(size_t)(h * head_dim + i)];
      if (const int64_t j = i - offset; j >= 0 && j < rot) {
        const int64_t pair = interleaved ? j / 2 : j % half;
        const bool second = interleaved ? j % 2 : j >= half;
        const int64_t other = offset + (interleaved ? j ^ 1 : second ? j - half : j + half);
        const volatile float a = want * angles[(size_t)pair],
                             b = x[(size_t)(h * head_dim + other)] * angles[(size_t)(half + pair)];
        want = second ? a + b : a - b;  // as Transformers rounds: two products, one sum
      }
      if (!check(o[h * head_dim + i] == want, "%s rope heads=%ld d=%ld rot=%ld%s%s head %ld [%ld]: %.8g, not %.8g",
                 v.name.c_str(), (long)heads, (long)head_dim, (long)rot, interleaved ? " interleaved" : "",
                 in_place ? " in place" : "", (long)h, (long)i, o[h * head_dim + i], want))
        return;
    }
}

// n columns of a table from any of its columns on: against double, with the same bits on every variant.
static void products(const std::vector<Variant>& all, int64_t n, int64_t width, Random& random) {
  const int64_t stride = 2 * n - 1;
  const std::vector<float> x = normal((size_t)width, 1, random), values = normal((size_t)(width * stride), 1, random);
  for (int64_t first : {int64_t(0), n / 2, n - 1}) {
    std::vector<float> expected;
    for (const Variant& v : all) {
      Buffer a((size_t)width * 4), table((size_t)(width * stride) * 4), out((size_t)n * 4);
      fill(a, x);
      fill(table, values);
      v.kernels->vector_product(floats(a), width, floats(table) + first, stride, n, floats(out));
      if (expected.empty()) expected.assign(floats(out), floats(out) + n);
      check(!memcmp(floats(out), expected.data(), (size_t)n * 4), "%s product n=%ld: not the bits of %s", v.name.c_str(),
            (long)n, all[0].name.c_str());
    }
    for (int64_t i = 0; i < n; ++i) {
      double want = 0, size = 0;
      for (int64_t d = 0; d < width; ++d) {
        const double term = double(x[(size_t)d]) * values[(size_t)(d * stride + first + i)];
        want += term, size += std::fabs(term);
      }
      if (!check(std::fabs(expected[(size_t)i] - want) <= 1e-6 * size, "product n=%ld [%ld]: %.8g, not %.8g", (long)n, (long)i,
                 expected[(size_t)i], want))
        return;
    }
  }
}

static void limits(const Variant& v) {
  const std::vector<float> x = {0, 1, -1, 2.5f, -2.5f, INFINITY, -INFINITY, NAN, 1e-40f, 0.5f, -0.5f, 3, 4, 5, 6, 7, -7};
  for (const auto& [low, high] : {std::pair{-0.5f, 2.0f}, {-INFINITY, 1.0f}, {-1.0f, INFINITY}}) {
    Buffer a(x.size() * 4);
    fill(a, x);
    v.kernels->clamp(floats(a), low, high, (int64_t)x.size(), floats(a));
    for (size_t i = 0; i < x.size(); ++i)
      check(std::isnan(x[i]) ? std::isnan(floats(a)[i]) : floats(a)[i] == std::clamp(x[i], low, high), "%s clamp(%g) = %g",
            v.name.c_str(), x[i], floats(a)[i]);
  }
}

static void extremes(const Variant& v) {
  const std::vector<float> g = {0, -0.0f, 100, -100, 1e30f, -1e30f, INFINITY, NAN, 88.5f, -88.5f, -104, 1e-40f};
  const std::vector<float> one(g.size(), 1.0f);
  const std::vector<float> y = run(*v.kernels, 2, {g, one}, (int64_t)g.size(), false);
  for (size_t i = 0; i < g.size(); ++i) {
    const double want = g[i] / (1 + std::exp(-(double)g[i]));
    check(std::isnan(g[i]) ? std::isnan(y[i]) : y[i] == want || std::fabs(y[i] - want) <= 1e-6 * std::fabs(want) + 1e-37,
          "%s silu(%g) = %g", v.name.c_str(), g[i], y[i]);
  }
  const std::vector<float> s = run(*v.kernels, 3, {g, one}, (int64_t)g.size(), false);
  for (size_t i = 0; i < g.size(); ++i) {
    const double want = 1 / (1 + std::exp(-(double)g[i]));
    check(std::isnan(g[i]) ? std::isnan(s[i]) : std::fabs(s[i] - want) <= 1e-6 * want + 1e-37, "%s sigmoid(%g) = %g",
          v.name.c_str(), g[i], s[i]);
  }
  for (const Inputs& in : {Inputs{g, one}, Inputs{one, g}}) {
    const std::vector<float> clamped = run(*v.kernels, 6, in, (int64_t)g.size(), false);
    for (size_t i = 0; i < g.size(); ++i)
      check(std::isnan(clamped[i]) == std::isnan(g[i]), "%s clamped_swiglu(%g, %g) = %g", v.name.c_str(), in.a[i], in.b[i],
            clamped[i]);
  }
  for (float bad : {(float)NAN, INFINITY})
    for (int at : {0, 5, 36}) {
      std::vector<float> x(37, 1.0f);
      x[(size_t)at] = bad;
      for (float y : run(*v.kernels, 4, {x, x}, 37, false))
        check(std::isnan(y), "%s softmax with %g at %d: %g", v.name.c_str(), bad, at, y);
    }
  std::vector<float> x(37, -INFINITY);
  x[20] = 3;
  const std::vector<float> certain = run(*v.kernels, 4, {x, x}, 37, false);
  for (size_t i = 0; i < 37; ++i)
    check(certain[i] == (i == 20), "%s softmax of a certain choice: %g at %zu", v.name.c_str(), certain[i], i);
  const std::vector<float> zeros(37, 0.0f), ones(37, 1.0f);
  for (float x : run(*v.kernels, 0, {zeros, ones}, 37, false)) check(x == 0, "%s rms_norm of zeros is %g", v.name.c_str(), x);
}

int main() {
  Random random(3);
  const std::vector<Variant> all = vector_variants();
  for (int64_t n = 1; n <= 130; ++n) {
    rows(all, n, 1, random);
    ops(all, n, random);
    functions(*all[0].kernels, n, n % 2 ? 1 : 8, random);
  }
  for (int64_t n : {576, 1536, 4095}) rows(all, n, 20, random);
  for (int64_t n : {1, 2, 15, 16, 17, 63, 64, 65, 100, 130}) products(all, n, 1 + random.below(70), random);
  for (const Variant& v : all) {
    for (int i = 0; i < rounds(60); ++i) {
      const int64_t d = 2 * (1 + random.below(128)), rot = random.below(2) ? d : 2 * (1 + random.below((int)d / 2));
      rope(v, 1 + random.below(5), d, random.below((int)(d - rot) + 1), rot, i & 1, i & 2, random);
    }
    extremes(v);
    limits(v);
  }
  return report("test_elementwise");
}
