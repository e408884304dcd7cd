// Rows of a head with INT4: the Hadamard transform of a key or value as 4-bit codes of ggml's IQ4_NL values, which suit the
// nearly normal distribution that the transform gives, and one fp32 scale (the largest element becomes about -127). Products
// are computed with transformed rows: attention transforms q once per tile, and its output back.
#pragma once
#include "../tile_bytes.hpp"
#include "hadamard.hpp"

namespace dso::DSO_ISA_NAMESPACE {

struct Int4Values {
  int8_t numbers[16];  // ascending
  uint16_t bf16[32];   // the same, exactly, twice
  float least[16];     // from here on, a number has this code rather than the one before
};
static constexpr Int4Values make_int4_values() {
  Int4Values v = {};
  for (int code = 0; code < 16; ++code) {
    const int number = (int)iq4_values[code] - 128, size = number < 0 ? -number : number;
    int power = 0;
    while (size >> power > 1) ++power;
    v.numbers[code] = (int8_t)number;
    v.bf16[code] = v.bf16[code + 16] =
        (uint16_t)((number < 0 ? 0x8000 : 0) | (127 + power) << 7 | ((size << (7 - power)) & 0x7f));
    if (code > 0) v.least[code] = (float)(number + v.numbers[code - 1]) * 0.5f;
  }
  return v;
}
static constexpr Int4Values int4_values = make_int4_values();

// The values nearest to x, and their codes as floats if asked for. Ties go to the lower value, NaN to the lowest.
template <bool codes>
DSO_INLINE F nearest_int4(F x) {
  F y = set(codes ? 0.0f : (float)int4_values.numbers[0]);
#pragma GCC unroll 15
  for (int i = 1; i < 16; ++i) {
    const float step = codes ? 1.0f : (float)(int4_values.numbers[i] - int4_values.numbers[i - 1]);
    y = add(y, less(set(int4_values.least[i]), x, set(step), zero()));
  }
  return y;
}

struct Int4Fit {
  float scale, error, better;  // better: the scale with the smallest squared error for this one's codes
};

static Int4Fit fit_int4(const float* x, int64_t d, float scale) {
  const F inverse = set(1.0f / scale), s = set(scale);
  F error = zero(), xc = zero(), cc = zero();
  for (int64_t i = 0; i < d; i += lanes) {
    const F v = load(x + i, d - i), c = keep(nearest_int4<false>(mul(v, inverse)), 0, d - i, zero()), e = sub(mul(c, s), v);
    error = add(error, mul(e, e));
    xc = add(xc, mul(v, c));
    cc = add(cc, mul(c, c));
  }
  return {scale, sum(error), sum(xc) / sum(cc)};
}

// Codes of d elements, rounded up to a multiple of 16, and their scale. A row with a NaN or an infinity has scale NaN, an
// all-zero or tiny row scale 0.
static float int4_row(const float* x, int64_t d, uint8_t* codes) {
  float h[max_head_dim];
  memcpy(h, x, d * 4);
  hadamard(h, d);
  F high = zero(), low = zero(), poison = zero();
  for (int64_t i = 0; i < d; i += lanes) {
    const F v = load(h + i, d - i);
    high = max(high, v);
    low = max(low, sub(zero(), v));
    poison = fma(v, zero(), poison);
  }
  for (int64_t i = 0; i < d; i += lanes) store_i8(codes + i, to_int(zero()));
  if (any_nan(poison)) return __builtin_nanf("");
  const float up = largest(high), down = largest(low), top = up >= down ? up : -down;
  if (up < 1e-30f && down < 1e-30f) return 0.0f;  // their squares would underflow
  Int4Fit best = fit_int4(h, d, top / -127.0f);
  const Int4Fit narrow = fit_int4(h, d, top / -145.0f);
  if (narrow.error < best.error) best = narrow;
  const Int4Fit fitted = fit_int4(h, d, best.better);
  if (fitted.error < best.error) best = fitted;
  const F inverse = set(1.0f / best.scale);
  for (int64_t i = 0; i < d; i += lanes) store_i8(codes + i, to_int(nearest_int4<true>(mul(load(h + i, d - i), inverse))));
  return best.scale;
}

// d elements from pairs of codes, each the low and the high half of a byte `step` bytes after the one before.
static void read_int4_row(const uint8_t* codes, int64_t step, int64_t d, float scale, float* x) {
  for (int64_t i = 0; i < d; i += 2) {
    const uint8_t pair = codes[i / 2 * step];
    x[i] = (float)int4_values.numbers[pair & 15] * scale;
    x[i + 1] = (float)int4_values.numbers[pair >> 4] * scale;
  }
  hadamard_inverse(x, d);
}

// The keys of a block as a panel [d][32], from pairs of rows of codes.
static void read_int4_panel(const uint8_t* codes, const float* scales, int64_t d, float* x) {
  for (int64_t i = 0; i < d; i += 2)
    for (int64_t t = 0; t < 32; t += lanes) {
      const F scale = load(scales + t);
      I even, odd;
      look_up_halves(int4_values.numbers, codes + i / 2 * 32 + t, even, odd);
      store(x + i * 32 + t, mul(to_float(even), scale));
      store(x + (i + 1) * 32 + t, mul(to_float(odd), scale));
    }
  hadamard_inverse_panel(x, d);
}

static void write_int4_key(const float* k, int64_t d, uint8_t* head, float* scales, int64_t slot) {
  uint8_t codes[max_head_dim];
  scales[slot] = int4_row(k, d, codes);
  for (int64_t i = 0; i < d; i += 2) head[i / 2 * 32 + slot] = (uint8_t)(codes[i] | codes[i + 1] << 4);
}

// Tokens 2i and 2i + 1 share bytes: only one thread writes to a block.
static void write_int4_value(const float* v, int64_t d, uint8_t* values, int64_t panel, float* scales, int64_t slot) {
  uint8_t codes[max_head_dim];
  scales[slot] = int4_row(v, d, codes);
  const int shift = slot % 2 * 4;
  for (int64_t i = 0; i < d; ++i) {
    uint8_t* pair = values + i / 32 * panel + slot / 2 * 32 + i % 32;
    *pair = (uint8_t)((*pair & (0xf0 >> shift)) | codes[i] << shift);
  }
}

static void read_int4_value(const uint8_t* values, int64_t panel, int64_t d, float scale, int64_t slot, float* x) {
  for (int64_t i = 0; i < d; ++i) {
    const uint8_t pair = values[i / 32 * panel + slot / 2 * 32 + i % 32];
    x[i] = (float)int4_values.numbers[pair >> (slot % 2 * 4) & 15] * scale;
  }
  hadamard_inverse(x, d);
}
}  // namespace dso::DSO_ISA_NAMESPACE
