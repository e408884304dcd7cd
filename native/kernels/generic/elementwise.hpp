// Element-wise kernels, one row per call, any width. Each follows Transformers' fp32 arithmetic operation by operation.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

// out[i] = f(a[i]), and f(a[i], b[i]), for functions of lanes. out may alias an input.
template <class Function>
DSO_INLINE void each(const float* a, int64_t n, float* out, const Function& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, f(load(a + i)));
  if (i < n) store(out + i, f(load(a + i, n - i)), n - i);
}
template <class Function>
DSO_INLINE void each(const float* a, const float* b, int64_t n, float* out, const Function& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, f(load(a + i), load(b + i)));
  if (i < n) store(out + i, f(load(a + i, n - i), load(b + i, n - i)), n - i);
}

// Four accumulators, added in a fixed tree: bitwise equal on every ISA.
static float sum_of_squares(const float* x, int64_t n) {
  F s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) {
      const F v = load(x + i + 16 * j);
      s[j] = fma(v, v, s[j]);
    }
  for (; i < n; i += 16) {
    const F v = load(x + i, n - i);
    s[0] = fma(v, v, s[0]);
  }
  return sum(add(add(s[0], s[1]), add(s[2], s[3])));
}

// x / sqrt(mean(x^2) + eps) * weight.
static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float mean = sum_of_squares(x, n) / (float)n;
  const F scale = set(1.0f / __builtin_sqrtf(mean + eps));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < n) store(out + i, mul(mul(load(x + i, n - i), scale), load(weight + i, n - i)), n - i);
}

// (x - mean) / sqrt(variance + eps) * weight + bias. The variance is the mean of squared differences, so that a mean far from
// zero costs no precision. Sums as in rms_norm.
static void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out) {
  const auto total = [=](auto term) {
    F s[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
      for (int j = 0; j < 4; ++j) s[j] = add(s[j], term(load(x + i + 16 * j)));
    for (; i < n; i += 16) s[0] = add(s[0], keep(term(load(x + i, n - i)), 0, n - i, zero()));
    return sum(add(add(s[0], s[1]), add(s[2], s[3])));
  };
  const F mean = set(total([](F v) { return v; }) / (float)n);
  const float variance = total([=](F v) { return mul(sub(v, mean), sub(v, mean)); }) / (float)n;
  const F scale = set(1.0f / __builtin_sqrtf(variance + eps));
  for (int64_t i = 0; i < n; i += 16)
    store(out + i, fma(mul(sub(load(x + i, n - i), mean), scale), load(weight + i, n - i), load(bias + i, n - i)), n - i);
}

static void add(const float* a, const float* b, int64_t n, float* out) {
  each(a, b, n, out, [](F x, F y) { return add(x, y); });
}

// silu(gate) * up
static void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  each(gate, up, n, out, [](F x, F y) { return mul(silu(x), y); });
}

static void multiply(const float* a, const float* b, int64_t n, float* out) {
  each(a, b, n, out, [](F x, F y) { return mul(x, y); });
}

static void scale(const float* x, float factor, int64_t n, float* out) {
  each(x, n, out, [=](F v) { return mul(v, set(factor)); });
}

// gelu(gate) * up
static void geglu(const float* gate, const float* up, int64_t n, float* out) {
  each(gate, up, n, out, [](F x, F y) { return mul(gelu(x), y); });
}

// (up' + raise) * gate' * sigmoid(alpha * gate'), where gate' = min(gate, limit) and up' is up limited to [-limit, limit]. A
// NaN stays one: it is the second operand of min and max.
static void clamped_swiglu(const float* gate, const float* up, int64_t n, float alpha, float limit, float raise, float* out) {
  const F factor = set(alpha), high = set(limit), low = set(-limit), more = set(raise);
  each(gate, up, n, out, [=](F x, F y) {
    const F g = min(high, x), u = max(low, min(high, y));
    return mul(add(u, more), mul(g, sigmoid(mul(factor, g))));
  });
}

// e^(x - max x) divided by their sum, which uses one accumulator. A NaN or a positive infinity makes all NaN, as in torch.
static void softmax(const float* x, int64_t n, float* out) {
  const F least = set(-__builtin_inff());
  F top = least;
  for (int64_t i = 0; i < n; i += 16) top = max(top, keep(load(x + i, n - i), 0, n - i, least));
  const F shift = set(largest(top));
  F total = zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F e = exp(sub(load(x + i, n - i), shift));
    store_some(out + i, e, n - i);
    total = add(total, keep(e, 0, n - i, zero()));
  }
  const F whole = set(sum(total));
  for (int64_t i = 0; i < n; i += 16) store_some(out + i, div(load(out + i, n - i), whole), n - i);
}

static void sigmoid(const float* x, int64_t n, float* out) {
  each(x, n, out, [](F v) { return sigmoid(v); });
}

// x * sigmoid(gate); `one`: gate is a single element
static void sigmoid_gate(const float* x, const float* gate, bool one, int64_t n, float* out) {
  if (one) {
    const F weight = sigmoid(set(gate[0]));
    each(x, n, out, [=](F v) { return mul(v, weight); });
  } else {
    each(x, gate, n, out, [](F v, F g) { return mul(v, sigmoid(g)); });
  }
}

// y = fma(x, scale, y)
static void add_scaled(const float* x, float scale, int64_t n, float* y) {
  const F factor = set(scale);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, fma(load(x + i), factor, load(y + i)));
  if (i < n) store(y + i, fma(load(x + i, n - i), factor, load(y + i, n - i)), n - i);
}

// min(max(x, low), high). A NaN stays one: it is the second operand.
static void clamp(const float* x, float low, float high, int64_t n, float* out) {
  each(x, n, out, [=](F v) { return min(set(high), max(set(low), v)); });
}

// out[i] = sum over d, ascending, of x[d] * table[d * stride + i], for i in [0, n).
static void vector_product(const float* x, int64_t width, const float* table, int64_t stride, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    F s[4] = {zero(), zero(), zero(), zero()};
    for (int64_t d = 0; d < width; ++d)
      for (int j = 0; j < 4; ++j) s[j] = fma(set(x[d]), load(table + d * stride + i + 16 * j), s[j]);
    for (int j = 0; j < 4; ++j) store(out + i + 16 * j, s[j]);
  }
  for (; i < n; i += 16) {
    F s = zero();
    for (int64_t d = 0; d < width; ++d) s = fma(set(x[d]), load(table + d * stride + i, n - i), s);
    store_some(out + i, s, n - i);
  }
}

// Rotates elements [offset, offset + rot) of every head by the angles of `table` (cos[rot/2] | sin[rot/2]), and copies the
// others. Pairs are (i, i + rot/2), or (2i, 2i+1) if interleaved. out may be x.
static void rope(const float* x_heads, const float* table, int64_t heads, int64_t head_dim, int64_t offset, int64_t rot,
                 bool interleaved, float* out_heads) {
  const int64_t half = rot / 2;
  const float *cosine = table, *sine = table + half;
  for (int64_t h = 0; h < heads; ++h, x_heads += head_dim, out_heads += head_dim) {
    const float* x = x_heads + offset;
    float* out = out_heads + offset;
    if (interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        out[2 * i] = a * cosine[i] - b * sine[i];
        out[2 * i + 1] = b * cosine[i] + a * sine[i];
      }
    } else {
      for (int64_t i = 0; i < half; i += 16) {
        const int64_t n = half - i;
        const F a = load(x + i, n), b = load(x + half + i, n), c = load(cosine + i, n), s = load(sine + i, n);
        store(out + i, sub(mul(a, c), mul(b, s)), n);
        store(out + half + i, add(mul(b, c), mul(a, s)), n);
      }
    }
    if (out == x) continue;
    for (int64_t i = 0; i < offset; ++i) out_heads[i] = x_heads[i];
    for (int64_t i = offset + rot; i < head_dim; ++i) out_heads[i] = x_heads[i];
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
