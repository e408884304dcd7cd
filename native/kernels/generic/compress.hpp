// Compressed attention (DeepSeek-V4, section 2.3): an entry is a weighted mean of its tokens' rows, element by element.
//
// Lanes are elements: maximum, weights and sums of 16 of them pass over all tokens, in ascending order, so that an entry's bits
// depend on its own tokens only.
#pragma once
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// Elements [i, i + n) of a row, n up to 16.
DSO_INLINE F row_elements(const KvLayout& l, const uint8_t* row, int64_t i, int64_t n) {
  if (l.type == DSO_KV_F32) return load((const float*)row + i, n);
  if (n >= 16) return load_bf16(row + 2 * i);
  uint16_t room[16] = {};
  memcpy(room, row + 2 * i, 2 * n);
  return load_bf16((const uint8_t*)room);
}

static void compress_entry(const KvLayout& l, const KvView& v, int64_t entry, int64_t every, bool overlap, const float* bias,
                           int64_t width, float* out) {
  const int64_t series = overlap ? 2 : 1, first = entry * every, own = (series - 1) * width;
  const int64_t start = overlap && entry > 0 ? first - every : first;
  for (int64_t i = 0; i < width; i += 16) {
    const int64_t n = width - i < 16 ? width - i : 16;
    const auto logit = [&](int64_t t) {
      const int64_t part = t < first ? i : own + i;
      return add(row_elements(l, latent_row(l, v, t), series * width + part, n),
                 load(bias + t % every * series * width + part, n));
    };
    F top = set(-__builtin_inff());
    for (int64_t t = start; t < first + every; ++t) top = max(top, logit(t));
    F total = zero(), mean = zero();
    for (int64_t t = start; t < first + every; ++t) {
      const F weight = exp(sub(logit(t), top));
      total = add(total, weight);
      mean = fma(weight, row_elements(l, latent_row(l, v, t), t < first ? i : own + i, n), mean);
    }
    store(out + i, div(mean, total), n);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
