// Row-wise ops of training, forward and backward: RMS norm, SwiGLU, RoPE. Arithmetic is in fp32, with one rounding per stored
// element. T is float, or uint16_t for bf16. Results may alias operands element for element unless a comment says otherwise.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

// ---- y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)
template <class T>
static void rms_norm_row(const T* x, const T* weight, int64_t n, float eps, T* y, float* rstd) {
  F s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) {
      const F v = load_some(x + i + 16 * j, 16);
      s[j] = fma(v, v, s[j]);
    }
  for (; i < n; i += 16) {
    const F v = load_some(x + i, n - i);
    s[0] = fma(v, v, s[0]);
  }
  const float mean = sum(add(add(s[0], s[1]), add(s[2], s[3]))) / (float)n;
  *rstd = 1.0f / __builtin_sqrtf(mean + eps);
  const F scale = set(*rstd);
  for (i = 0; i < n; i += 16) store_some(y + i, mul(mul(load_some(x + i, n - i), scale), load_some(weight + i, n - i)), n - i);
}

// dx = rstd (g - x rstd^2 mean(g x)), g = dy w;  dw += dy x rstd, unless it is null
template <class T>
static void rms_norm_backward_row(const T* dy, const T* x, const T* weight, float rstd, int64_t n, T* dx, float* dw) {
  F s[2] = {zero(), zero()};
  for (int64_t i = 0; i < n; i += 32)
    for (int j = 0; j < 2 && i + 16 * j < n; ++j) {
      const int64_t k = i + 16 * j;
      s[j] = fma(mul(load_some(dy + k, n - k), load_some(weight + k, n - k)), load_some(x + k, n - k), s[j]);
    }
  const float mean = sum(add(s[0], s[1])) / (float)n;
  const F scale = set(rstd), pull = set(mean * rstd * rstd);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t k = n - i;
    const F d = load_some(dy + i, k), v = load_some(x + i, k);
    if (dw) store_some(dw + i, fma(mul(d, v), scale, load_some(dw + i, k)), k);
    store_some(dx + i, mul(scale, fnma(v, pull, mul(d, load_some(weight + i, k)))), k);
  }
}

// ---- h = silu(gate) up
template <class T>
static void swiglu_row(const T* gate, const T* up, int64_t n, T* h) {
  for (int64_t i = 0; i < n; i += 16) store_some(h + i, mul(silu(load_some(gate + i, n - i)), load_some(up + i, n - i)), n - i);
}

// dgate = dh up s (1 + gate (1 - s)), dup = dh gate s, s = sigmoid(gate); h = gate s up if requested
template <class T>
static void swiglu_backward_row(const T* gate, const T* up, const T* dh, int64_t n, T* dgate, T* dup, T* h) {
  const F one = set(1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t k = n - i;
    const F g = load_some(gate + i, k), u = load_some(up + i, k), d = load_some(dh + i, k), s = sigmoid(g), act = mul(g, s);
    if (h) store_some(h + i, mul(silu(g), u), k);
    store_some(dgate + i, mul(mul(d, u), mul(s, fma(g, sub(one, s), one))), k);
    store_some(dup + i, mul(d, act), k);
  }
}

// ---- out = scale x (+ out)
template <class X, class T>
static void scale_range(const X* x, float scale, bool adds, int64_t n, T* out) {
  const F factor = set(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const F v = mul(load_some(x + i, n - i), factor);
    store_some(out + i, adds ? add(load_some(out + i, n - i), v) : v, n - i);
  }
}

// ---- out = the sum of `count` rows of x (+ out), in this order
template <class X, class T>
static void sum_of_rows(const X* x, int64_t ld, const int64_t* which, int64_t count, int64_t n, bool adds, T* out) {
  for (int64_t i = 0; i < n; i += 16) {
    F total = zero();
    for (int64_t k = 0; k < count; ++k) total = add(total, load_some(x + which[k] * ld + i, n - i));
    store_some(out + i, adds ? add(load_some(out + i, n - i), total) : total, n - i);
  }
}

// ---- RoPE for the heads of a token. Pair i is elements (i, i + half), or, interleaved, (2i, 2i + 1) on the side of x:
//   forward   a' = a cos_i - b sin_i,  b' = b cos_(i + half) + a sin_(i + half)       x may be interleaved
//   backward  a' = a cos_i + b sin_(i + half),  b' = b cos_(i + half) - a sin_i       out may be interleaved
// Elements from 2 half on are copied. With interleaving, out must not be x.
template <class T>
DSO_INLINE void load_pairs(const T* p, int64_t n, F& a, F& b) {
  float x[16] = {}, y[16] = {};
  for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) {
    if constexpr (sizeof(T) == 2)
      x[i] = from_bf16(p[2 * i]), y[i] = from_bf16(p[2 * i + 1]);
    else
      x[i] = p[2 * i], y[i] = p[2 * i + 1];
  }
  a = load(x);
  b = load(y);
}
template <class T>
DSO_INLINE void store_pairs(T* p, F a, F b, int64_t n) {
  T x[16], y[16];
  store_some(x, a, 16);
  store_some(y, b, 16);
  for (int64_t i = 0; i < (n < 16 ? n : 16); ++i) p[2 * i] = x[i], p[2 * i + 1] = y[i];
}

template <class T>
static void rope_token(const dso_train_rotation& r, const T* x, const T* cosine, const T* sine, T* out) {
  const int64_t half = r.half;
  for (int64_t h = 0; h < r.heads; ++h, x += r.x_head, out += r.out_head) {
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t n = half - i;
      const int64_t second = r.halves ? i + half : i;
      const F c1 = load_some(cosine + i, n), c2 = load_some(cosine + second, n), s1 = load_some(sine + i, n),
              s2 = load_some(sine + second, n);
      F a, b;
      if (r.interleaved && !r.backward)
        load_pairs(x + 2 * i, n, a, b);
      else
        a = load_some(x + i, n), b = load_some(x + half + i, n);
      const F left = r.backward ? fma(b, s2, mul(a, c1)) : fnma(b, s1, mul(a, c1));
      const F right = r.backward ? fnma(a, s1, mul(b, c2)) : fma(a, s2, mul(b, c2));
      if (r.interleaved && r.backward) {
        store_pairs(out + 2 * i, left, right, n);
      } else {
        store_some(out + i, left, n);
        store_some(out + half + i, right, n);
      }
    }
    if (out != x && r.head_dim > 2 * half) memcpy(out + 2 * half, x + 2 * half, (size_t)(r.head_dim - 2 * half) * sizeof(T));
  }
}

// ---- by type
static bool is_bf16(int32_t type) { return type == DSO_TYPE_BF16; }

static void rms_norm_forward(int32_t type, const void* x, const void* weight, int64_t n, float eps, void* y, float* rstd) {
  if (is_bf16(type))
    rms_norm_row((const uint16_t*)x, (const uint16_t*)weight, n, eps, (uint16_t*)y, rstd);
  else
    rms_norm_row((const float*)x, (const float*)weight, n, eps, (float*)y, rstd);
}
static void rms_norm_backward(int32_t type, const void* dy, const void* x, const void* weight, float rstd, int64_t n, void* dx,
                              float* dw) {
  if (is_bf16(type))
    rms_norm_backward_row((const uint16_t*)dy, (const uint16_t*)x, (const uint16_t*)weight, rstd, n, (uint16_t*)dx, dw);
  else
    rms_norm_backward_row((const float*)dy, (const float*)x, (const float*)weight, rstd, n, (float*)dx, dw);
}
static void swiglu_forward(int32_t type, const void* gate, const void* up, int64_t n, void* h) {
  if (is_bf16(type))
    swiglu_row((const uint16_t*)gate, (const uint16_t*)up, n, (uint16_t*)h);
  else
    swiglu_row((const float*)gate, (const float*)up, n, (float*)h);
}
static void swiglu_backward(int32_t type, const void* gate, const void* up, const void* dh, int64_t n, void* dgate, void* dup,
                            void* h) {
  if (is_bf16(type))
    swiglu_backward_row((const uint16_t*)gate, (const uint16_t*)up, (const uint16_t*)dh, n, (uint16_t*)dgate, (uint16_t*)dup,
                        (uint16_t*)h);
  else
    swiglu_backward_row((const float*)gate, (const float*)up, (const float*)dh, n, (float*)dgate, (float*)dup, (float*)h);
}
static void rope_heads(const dso_train_rotation& r, const void* x, const void* cosine, const void* sine, void* out) {
  if (is_bf16(r.type))
    rope_token(r, (const uint16_t*)x, (const uint16_t*)cosine, (const uint16_t*)sine, (uint16_t*)out);
  else
    rope_token(r, (const float*)x, (const float*)cosine, (const float*)sine, (float*)out);
}
static void rows_summed(int32_t x_type, const void* x, int64_t ld, const int64_t* which, int64_t count, int64_t n, bool adds,
                        int32_t out_type, void* out) {
  if (is_bf16(x_type)) {
    if (is_bf16(out_type))
      sum_of_rows((const uint16_t*)x, ld, which, count, n, adds, (uint16_t*)out);
    else
      sum_of_rows((const uint16_t*)x, ld, which, count, n, adds, (float*)out);
  } else {
    if (is_bf16(out_type))
      sum_of_rows((const float*)x, ld, which, count, n, adds, (uint16_t*)out);
    else
      sum_of_rows((const float*)x, ld, which, count, n, adds, (float*)out);
  }
}
static void scale_numbers(int32_t x_type, const void* x, float scale, bool adds, int64_t begin, int64_t end, int32_t out_type,
                          void* out) {
  const int64_t n = end - begin;
  if (is_bf16(x_type)) {
    if (is_bf16(out_type))
      scale_range((const uint16_t*)x + begin, scale, adds, n, (uint16_t*)out + begin);
    else
      scale_range((const uint16_t*)x + begin, scale, adds, n, (float*)out + begin);
  } else {
    if (is_bf16(out_type))
      scale_range((const float*)x + begin, scale, adds, n, (uint16_t*)out + begin);
    else
      scale_range((const float*)x + begin, scale, adds, n, (float*)out + begin);
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
