// Columns of recurrent states: independent of each other, so that a tile of 16 of them stays in the first cache while all rows
// of a step pass. Rows are processed one after the other whatever their number: prefill and decode give the same bits.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE const float* row_at(const float* p, int64_t stride, int64_t row) {
  return (const float*)((const char*)p + row * stride);
}

static void short_conv(const float* x, int64_t x_stride, int64_t n, int64_t cols, const float* weight, int64_t weight_stride,
                       const float* bias, int64_t taps, bool use_silu, float* state, float* y, int64_t y_stride) {
  const int64_t before = taps - 1;  // rows in the state
  for (int64_t t = 0; t < n; ++t) {
    F sum = bias ? load(bias, cols) : zero();
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t row = t - before + j;
      const F value = row < 0 ? load(state + (before + row) * 16) : load(row_at(x, x_stride, row), cols);
      sum = fma(load(row_at(weight, weight_stride, j), cols), value, sum);
    }
    store_some((float*)row_at(y, y_stride, t), use_silu ? silu(sum) : sum, cols);
  }
  for (int64_t i = 0; i < before; ++i) {  // ascending: rows that stay move to the front
    const int64_t row = n - before + i;
    store(state + i * 16, row < 0 ? load(state + (before + row) * 16) : load(row_at(x, x_stride, row), cols));
  }
}

static void unit_length(const float* x, int64_t n, float scale, float* out) {
  const float squares = sum_of_squares(x, n);
  const F factor = set(1.0f / __builtin_sqrtf(squares + 1e-6f)), whole = set(scale);
  for (int64_t i = 0; i < n; i += 16) store_some(out + i, mul(mul(load(x + i, n - i), factor), whole), n - i);
}

// S = d S; u = rate (v - S^T k); S += k u^T; o = S^T q. d is a number, or one for each row of S. Sums over k_dim have four
// accumulators, added in a fixed tree.
template <bool channels>
DSO_INLINE void delta_row(const float* q, const float* k, F v, int64_t k_dim, const float* decay, float rate, float* state,
                          F& out) {
  const F d = set(*decay);
  const auto decayed = [=](int64_t i) {
    const F s = load(state + i * 16);
    return channels ? mul(set(decay[i]), s) : s;
  };
  F s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 <= k_dim; i += 4)
    for (int j = 0; j < 4; ++j) s[j] = fma(decayed(i + j), set(k[i + j]), s[j]);
  for (; i < k_dim; ++i) s[0] = fma(decayed(i), set(k[i]), s[0]);
  const F total = add(add(s[0], s[1]), add(s[2], s[3]));
  const F update = mul(set(rate), sub(v, channels ? total : mul(d, total)));
  F r[4] = {zero(), zero(), zero(), zero()};
  const auto updated = [=](int64_t i) {
    const F next = fma(set(k[i]), update, channels ? decayed(i) : mul(d, load(state + i * 16)));
    store(state + i * 16, next);
    return next;
  };
  for (i = 0; i + 4 <= k_dim; i += 4)
    for (int j = 0; j < 4; ++j) r[j] = fma(updated(i + j), set(q[i + j]), r[j]);
  for (; i < k_dim; ++i) r[0] = fma(updated(i), set(q[i]), r[0]);
  out = add(add(r[0], r[1]), add(r[2], r[3]));
}

static void delta_rule(const float* q, const float* k, const float* v, int64_t v_stride, int64_t n, int64_t k_dim, int64_t cols,
                       const float* decay, const float* rate, bool channels, float* state, float* o, int64_t o_stride) {
  for (int64_t t = 0; t < n; ++t, q += k_dim, k += k_dim, decay += channels ? k_dim : 1) {
    const F value = load(row_at(v, v_stride, t), cols);
    F out;
    if (channels)
      delta_row<true>(q, k, value, k_dim, decay, rate[t], state, out);
    else
      delta_row<false>(q, k, value, k_dim, decay, rate[t], state, out);
    store_some((float*)row_at(o, o_stride, t), out, cols);
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
