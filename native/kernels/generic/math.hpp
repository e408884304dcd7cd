// Functions shared by the lanes of every ISA: elementary functions with bitwise equal results, scalar conversions, stores.
#ifndef DSO_MATH_HPP  // not #pragma once: test_lanes includes it for several ISAs
#define DSO_MATH_HPP

namespace dso::DSO_ISA_NAMESPACE {

// e^x with a relative error below 1e-7 where the result is normal; exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
// x = n ln2 + r, |r| <= ln2/2; e^r by Cephes' expf polynomial, then scaled by 2^n.
DSO_INLINE F exp(F x) {
  x = min(set(89.0f), max(set(-104.0f), x));  // e^89 overflows, e^-104 rounds to 0; a NaN in the second operand is preserved
  const F n = round(mul(x, set(1.44269504f)));
  F r = fnma(n, set(0.693359375f), x);  // ln2 in two parts: n times the first is exact
  r = fnma(n, set(-2.12194440e-4f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  return scale2(add(fma(p, mul(r, r), r), set(1.0f)), n);
}

// 2^x for x <= 0, for softmax: exactly 1 at 0, exactly 0 below -150 and at -inf, NaN stays NaN; relative error below 2e-7.
// x = n + f, |f| <= 1/2; 2^f by the minimax polynomial of degree 5 whose constant is 1.
DSO_INLINE F exp2(F x) {
  x = max(set(-200.0f), x);
  const F n = round(x), f = sub(x, n);
  F p = set(1.32647238e-3f);
  p = fma(p, f, set(9.67151299e-3f));
  p = fma(p, f, set(5.55073358e-2f));
  p = fma(p, f, set(2.40222424e-1f));
  p = fma(p, f, set(6.93147004e-1f));
  return scale2(fma(p, f, set(1.0f)), n);
}

DSO_INLINE F sigmoid(F x) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), x)))); }
DSO_INLINE F silu(F x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }  // x * sigmoid(x)

// x / 2 * (1 + tanh(z)) = x / (1 + e^(-2 z)), z = sqrt(2 / pi) * (x + 0.044715 x^3)
DSO_INLINE F gelu(F x) {
  const F z = mul(set(-1.5957691f), fma(mul(x, mul(x, x)), set(0.044715f), x));
  return div(x, add(set(1.0f), exp(z)));
}
// x / 2 * (1 + erf(x / sqrt(2))) with an error below 2e-7 |x|; exactly 0 below -sqrt(32), where the result is above -5e-8. erf
// by the rational function of Eigen (generic_fast_erf_float), which is 1 within rounding at 4.
DSO_INLINE F gelu_erf(F x) {
  const F z = min(set(4.0f), mul(x, set(0.70710678f)));  // a NaN in the second operand is preserved
  const F square = mul(z, z), half = mul(x, set(0.5f));
  F p = set(-2.72614225801306e-10f);
  p = fma(p, square, set(2.77068142495902e-8f));
  p = fma(p, square, set(-2.10102402082508e-6f));
  p = fma(p, square, set(-5.69250639462346e-5f));
  p = fma(p, square, set(-7.34990630326855e-4f));
  p = fma(p, square, set(-2.95459980854025e-3f));
  p = fma(p, square, set(-1.60960333262415e-2f));
  F q = set(-1.45660718464996e-5f);
  q = fma(q, square, set(-2.13374055278905e-4f));
  q = fma(q, square, set(-1.68282697438203e-3f));
  q = fma(q, square, set(-7.37332916720468e-3f));
  q = fma(q, square, set(-1.42647390514189e-2f));
  return less(x, set(-5.6568542f), zero(), fma(half, div(mul(z, p), q), half));
}
// Near 0 by Cephes' tanhf polynomial: 1 - 2 / (e^2x + 1) would lose the small digits of x.
DSO_INLINE F tanh(F x) {
  const F square = mul(x, x);
  F p = set(-5.70498872745e-3f);
  p = fma(p, square, set(2.06390887954e-2f));
  p = fma(p, square, set(-5.37397155531e-2f));
  p = fma(p, square, set(1.33314422036e-1f));
  p = fma(p, square, set(-3.33332819422e-1f));
  const F small = fma(mul(p, square), x, x);
  const F large = sub(set(1.0f), div(set(2.0f), add(exp(add(x, x)), set(1.0f))));
  return less(square, set(0.390625f), small, large);
}

DSO_INLINE float from_bf16(uint16_t x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Stores n elements, at most 16: a masked store costs many times a plain one on AVX2.
DSO_INLINE void store_some(float* p, F x, int64_t n) {
  if (n >= 16) return store(p, x);
  store(p, x, n);
}
}  // namespace dso::DSO_ISA_NAMESPACE
#endif
