// Chooses the scale (and minimum) of a group of 32 weights: ggml's own first, then candidates that may have a smaller weighted
// error. The exact rule is in docs/contracts.md, its definition in src/deepseek_optimizer/quant/search.py, int4.py and q4_1.py.
//
// A lane is a row: 16 groups are searched side by side, and their sums run over the columns in order.
#pragma once
#include <cstdint>

#include "../kernels.hpp"
#include "dso.h"

namespace dso::DSO_ISA_NAMESPACE {
namespace packing {

constexpr int R = 16, C = 32;  // rows and columns of a tile
static_assert(R == lanes);

// Codes of a format: clamped to [least, most], stored as code + zero.
template <int format>
struct Code;
template <>
struct Code<DSO_INT8> {
  static constexpr int least = -127, most = 127, zero = 128, bits = 8;
};
template <>
struct Code<DSO_INT4> {
  static constexpr int least = -8, most = 7, zero = 8, bits = 4;
};
template <>
struct Code<DSO_INT8_NESTED> {
  static constexpr int least = -128, most = 119, zero = 136, bits = 8;
};
template <>
struct Code<DSO_Q4_1> {
  static constexpr int least = 0, most = 15, zero = 0, bits = 4;
};

static inline F as_f16(F x) {  // rounded to fp16, as float
  alignas(64) float wide[R];
  alignas(32) uint16_t half[R];
  store(wide, x), to_f16(wide, half);
  return load_f16(half);
}

// 16 groups, x[column][row]. n: number of existing columns. importance: weights of the columns' errors; null: the elements'
// magnitudes.
struct Groups {
  const float (*x)[R];
  int n;
  const float* importance;

  F weight(int k) const { return importance ? set(importance[k]) : abs(load(x[k])); }
};

struct Numbers {  // per group; exact in fp16
  F scale, least;
};

static inline F inverse_of(F scale) { return less(zero(), abs(scale), div(set(1), scale), zero()); }  // NaN: zero
template <int format>
static inline F nearest(F y, F inverse) {
  return min(max(round(mul(y, inverse)), set(Code<format>::least)), set(Code<format>::most));
}
template <int format>
static inline F above_least(F x, F least) {
  return format == DSO_Q4_1 ? sub(x, least) : x;
}
static inline F within(F x, F limit) {
  return min(limit, max(sub(zero(), limit), x));
}  // NaN is preserved: max and min return the second operand

template <int format>
static inline F weighted_error(const Groups& t, const Numbers& with) {
  const F inverse = inverse_of(with.scale);
  F total = zero();
  for (int k = 0; k < t.n; k++) {
    const F y = above_least<format>(load(t.x[k]), with.least), d = sub(y, mul(nearest<format>(y, inverse), with.scale));
    total = add(total, mul(mul(d, d), t.weight(k)));
  }
  return total;
}

constexpr float refit = 1.0f / 16,
                shift = 0.5f;  // how far a refit may move a scale, relative to itself, and a minimum, in steps

// The scale and minimum with the smallest weighted error for the codes of `old`, within a limited distance from it.
template <int format>
static inline Numbers fitted(const Groups& t, const Numbers& old) {
  const F inverse = inverse_of(old.scale);
  F sum_w = zero(), sum_q = zero(), sum_qq = zero(), sum_y = zero(), sum_qy = zero();
  for (int k = 0; k < t.n; k++) {
    const F y = above_least<format>(load(t.x[k]), old.least), q = nearest<format>(y, inverse), w = t.weight(k), wq = mul(w, q);
    sum_qq = add(sum_qq, mul(wq, q)), sum_qy = add(sum_qy, mul(wq, y));
    if constexpr (format == DSO_Q4_1) sum_w = add(sum_w, w), sum_q = add(sum_q, wq), sum_y = add(sum_y, mul(w, y));
  }
  const F step = abs(old.scale);
  if constexpr (format == DSO_Q4_1) {
    const F determinant = sub(mul(sum_w, sum_qq), mul(sum_q, sum_q));
    const F scale = div(sub(mul(sum_w, sum_qy), mul(sum_q, sum_y)), determinant);
    const F moved = div(sub(mul(sum_qq, sum_y), mul(sum_q, sum_qy)), determinant);
    return {as_f16(add(old.scale, within(sub(scale, old.scale), mul(step, set(refit))))),
            as_f16(add(old.least, within(moved, mul(step, set(shift)))))};
  }
  return {as_f16(add(old.scale, within(sub(div(sum_qy, sum_qq), old.scale), mul(step, set(refit))))), zero()};
}

template <int format>
struct Best {
  const Groups& groups;
  Numbers numbers;
  F error;

  void consider(const Numbers& other) {
    const F found = weighted_error<format>(groups, other);
    numbers = {less(found, error, other.scale, numbers.scale), less(found, error, other.least, numbers.least)};
    error = less(found, error, found, error);
  }
};

// Target code of the element with the largest magnitude: `first` is ggml's and the only one without importance.
constexpr float ends[] = {-6.5f, -7, -7.5f, -8.5f, -9, -9.5f, 6.5f, 7, 7.5f, 8, 8.5f, 9, 9.5f};
constexpr float first_end = -8;
// Fractions of a group's range to cut off at either end, in 32nds, below this limit: zero is ggml's choice.
constexpr int trims = 4;

// `largest`: the element with the largest magnitude (INT4); `low`, `high`: the range of the elements (Q4_1).
static inline Numbers first_int4(F largest) { return {as_f16(div(largest, set(first_end))), zero()}; }
static inline Numbers first_q4_1(F low, F high) { return {as_f16(div(sub(high, low), set(15))), as_f16(low)}; }

// Of INT8_NESTED: 16 steps. The element of largest magnitude becomes -128 steps, as -8 in INT4, unless one of the other sign
// would exceed 119 steps, the largest code whose upper part is at most 7.
static inline Numbers nested_scale(F low, F high) {
  const F above = max(high, zero()), below = max(sub(zero(), low), zero());
  const F larger = max(above, below), other = min(above, below);
  const F step = max(mul(larger, set(1.0f / 8)), div(mul(other, set(16)), set(119)));
  return {as_f16(less(below, above, sub(zero(), step), step)), zero()};
}

// `settled`: only lanes below zero are searched, the others keep the first choice.
static inline Numbers search_int4(const Groups& t, const Numbers& first, F settled, F largest) {
  Best<DSO_INT4> best{t, first, less(settled, zero(), weighted_error<DSO_INT4>(t, first), zero())};
  if (t.importance)
    for (const float end : ends) best.consider({as_f16(div(largest, set(end))), zero()});
  best.consider(fitted<DSO_INT4>(t, best.numbers));
  return best.numbers;
}

static inline Numbers search_q4_1(const Groups& t, const Numbers& first, F settled, F low, F high) {
  Best<DSO_Q4_1> best{t, first, less(settled, zero(), weighted_error<DSO_Q4_1>(t, first), zero())};
  const F span = sub(high, low);
  for (int trim = 1; trim < trims * trims; trim++) {
    const F least = add(low, mul(span, set((float)(trim / trims) / 32))),
            most = sub(high, mul(span, set((float)(trim % trims) / 32)));
    best.consider({as_f16(div(sub(most, least), set(15))), as_f16(least)});
  }
  best.consider(fitted<DSO_Q4_1>(t, best.numbers));
  return best.numbers;
}

}  // namespace packing
}  // namespace dso::DSO_ISA_NAMESPACE
