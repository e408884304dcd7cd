// Cross entropy of a row of logits, and its gradient in place of the logits.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

// log(sum of e^x) - x[label]; NaN if a logit is NaN or plus infinity, or all are minus infinity. The sum is computed in fp32 by
// parts, which are added in double. With `keeps`, an fp32 row is overwritten with e^(x - top).
template <class T>
static double loss_of(T* x, int64_t n, int64_t label, bool keeps, float& top, double& total) {
  F tops[4];
  for (F& t : tops) t = set(-3.4028234664e38f);  // not -inf, from which -inf cannot be subtracted
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) tops[j] = max(load_some(x + i + 16 * j, 16), tops[j]);  // the previous one if x is NaN
  for (; i < n; i += 16) tops[0] = max(keep(load_some(x + i, n - i), 0, n - i, tops[0]), tops[0]);
  top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));

  float target;
  if constexpr (sizeof(T) == 2)
    target = from_bf16(x[label]);
  else
    target = x[label];
  const F shift = set(top);
  total = 0;
  constexpr int64_t piece = 2048;
  for (int64_t begin = 0; begin < n; begin += piece) {
    const int64_t end = begin + piece < n ? begin + piece : n;
    F s[2] = {zero(), zero()};
    for (int64_t k = begin; k < end; k += 32)
      for (int j = 0; j < 2; ++j) {
        const int64_t at = k + 16 * j, few = end - at;
        if (few <= 0) break;
        const F e = exp(sub(load_some(x + at, few), shift));
        if constexpr (sizeof(T) == 4)
          if (keeps) store_some(x + at, e, few);
        s[j] = add(s[j], few < 16 ? keep(e, 0, few, zero()) : e);
      }
    total += (double)sum(add(s[0], s[1]));
  }
  return (double)top - (double)target + __builtin_log(total);
}

// (softmax(x) - [label]) factor, in type G from the start of the row: never past what is still to be read.
template <class T, class G>
static void gradient_of(T* x, int64_t n, int64_t label, float factor, float top, double total, G* out) {
  const F scale = set((float)((double)factor / total)), shift = set(top);
  F e_label;
  if constexpr (sizeof(T) == 4)
    e_label = set(x[label]);
  else
    e_label = exp(sub(set(from_bf16(x[label])), shift));
  for (int64_t i = 0; i < n; i += 16) {
    F e = load_some(x + i, n - i);
    if constexpr (sizeof(T) == 2) e = exp(sub(e, shift));
    store_some(out + i, mul(e, scale), n - i);
  }
  store_some(out + label, sub(mul(e_label, scale), set(factor)), 1);
}

static double cross_entropy(int32_t type, void* x, int64_t n, int64_t label, float factor, int32_t gradient) {
  const bool made = gradient >= 0;
  float top;
  double total;
  if (type == DSO_TYPE_BF16) {
    const double loss = loss_of((uint16_t*)x, n, label, made, top, total);
    if (made) gradient_of((uint16_t*)x, n, label, factor, top, total, (uint16_t*)x);
    return loss;
  }
  const double loss = loss_of((float*)x, n, label, made, top, total);
  if (made && gradient == DSO_TYPE_BF16) gradient_of((float*)x, n, label, factor, top, total, (uint16_t*)x);
  if (made && gradient == DSO_TYPE_F32) gradient_of((float*)x, n, label, factor, top, total, (float*)x);
  return loss;
}

}  // namespace dso::DSO_ISA_NAMESPACE
