// Passes over a row of logits for the choice of a token (runtime/choice.cpp).
#pragma once
#include "elementwise.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// Calls f(lanes, index of the first, number of elements in them); lanes after the end of the row are `filler`.
template <class Function>
DSO_INLINE void over_row(const float* x, int64_t n, F filler, const Function& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(load(x + i), i);
  if (i < n) f(keep(load(x + i, n - i), 0, n - i, filler), i);
}

// Index of the first of the largest elements; -1 if the largest is not finite or any element is NaN.
static int64_t first_largest(const float* x, int64_t n) {
  const F least = set(-__builtin_inff());
  F best = least;
  bool nan = false;
  over_row(x, n, least, [&](F v, int64_t) {
    nan |= any_nan(v);
    best = max(v, best);
  });
  const float top = largest(best);
  if (nan || !(top < __builtin_inff() && top > -__builtin_inff())) return -1;
  for (int64_t i = 0;; i += 16)
    if (const uint32_t found = at_least(n - i >= 16 ? load(x + i) : keep(load(x + i, n - i), 0, n - i, least), set(top)))
      return i + __builtin_ctz(found);
}

// The smallest element; NaN if any is.
static float smallest(const float* x, int64_t n) {
  F best = set(__builtin_inff());
  bool nan = false;
  over_row(x, n, best, [&](F v, int64_t) {
    nan |= any_nan(v);
    best = min(v, best);
  });
  return nan ? __builtin_nanf("") : -largest(sub(zero(), best));
}

static void divide(const float* x, float divisor, int64_t n, float* out) {
  each(x, n, out, [d = set(divisor)](F v) { return div(v, d); });
}

static void quotients(const float* a, const float* b, int64_t n, float* out) {
  each(a, b, n, out, [](F v, F w) { return div(v, w); });
}

// out[i] = e^(x[i] - top), within 1e-6 of its value, or below 1e-30 where that is below 1e-31.
static void exp_differences(const float* x, float top, int64_t n, float* out) {
  each(x, n, out, [t = set(top)](F v) { return exp(sub(v, t)); });
}

// maxima[c] = the largest of x[c], x[c + columns], ..., `rows` elements.
static void column_maxima(const float* x, int64_t rows, int64_t columns, float* maxima) {
  for (int64_t c = 0; c < columns; ++c) maxima[c] = x[c];
  for (int64_t r = 1; r < rows; ++r) each(maxima, x + r * columns, columns, maxima, [](F a, F b) { return max(b, a); });
}

// Indices, ascending, of the elements that are not below `bound`; returns their number.
static int64_t at_least_indices(const float* x, float bound, int64_t n, int32_t* indices) {
  int64_t count = 0;
  over_row(x, n, set(__builtin_nanf("")), [&](F v, int64_t i) {
    for (uint32_t found = at_least(v, set(bound)); found; found &= found - 1)
      indices[count++] = (int32_t)(i + __builtin_ctz(found));
  });
  return count;
}

}  // namespace dso::DSO_ISA_NAMESPACE
