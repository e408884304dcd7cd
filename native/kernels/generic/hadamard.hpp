// The Hadamard transform of the elements of a head. A head's length is split into its powers of two, largest first, and each
// part of n elements is multiplied by the Hadamard matrix H of that order (H H = n), by additions alone: for h = n/2, ..., 1
// elements i and i + h become their sum and difference. So (H q / n) . (H k) = q . k, and factors 1/n are exact.
#pragma once
#include "../kernels.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// The largest power of two up to n.
DSO_INLINE int64_t hadamard_order(int64_t n) {
  int64_t order = 1;
  while (2 * order <= n) order *= 2;
  return order;
}

// One part of n elements, each multiplied by `factor` at last.
static void hadamard_part(float* x, int64_t n, float factor) {
  for (int64_t h = n / 2; h >= lanes; h /= 2)
    for (int64_t begin = 0; begin < n; begin += 2 * h)
      for (int64_t i = begin; i < begin + h; i += lanes) {
        const F a = load(x + i), b = load(x + i + h);
        store(x + i, add(a, b));
        store(x + i + h, sub(a, b));
      }
  for (int64_t i = 0; i < n; i += lanes) {
    F a = load(x + i, n - i);
    if (n > 8) a = butterfly<8>(a);
    if (n > 4) a = butterfly<4>(a);
    if (n > 2) a = butterfly<2>(a);
    if (n > 1) a = butterfly<1>(a);
    store(x + i, mul(a, set(factor)), n - i);
  }
}

static void hadamard(float* x, int64_t d) {
  for (int64_t n; d > 0; x += n, d -= n) hadamard_part(x, n = hadamard_order(d), 1.0f);
}

// The inverse, which a query that is multiplied by transformed keys needs too.
static void hadamard_inverse(float* x, int64_t d) {
  for (int64_t n; d > 0; x += n, d -= n) {
    n = hadamard_order(d);
    hadamard_part(x, n, 1.0f / (float)n);
  }
}

// The inverse for the columns of a panel [d][32].
static void hadamard_inverse_panel(float* x, int64_t d) {
  for (int64_t n; d > 0; x += n * 32, d -= n) {
    n = hadamard_order(d);
    for (int64_t h = n / 2; h >= 1; h /= 2)
      for (int64_t i = 0; i < n; ++i) {
        if (i & h) continue;
        for (int64_t c = 0; c < 32; c += lanes) {
          float *first = x + i * 32 + c, *second = first + h * 32;
          const F a = load(first), b = load(second);
          store(first, add(a, b));
          store(second, sub(a, b));
        }
      }
    for (int64_t i = 0; i < n * 32; i += lanes) store(x + i, mul(load(x + i), set(1.0f / (float)n)));
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
