// Converts activations from fp32 to the rows that matrix products read: BF16, Q8 and Q16, laid out as in dso.h.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

// One group of 32 columns. A group with a NaN or an infinity gets scale NaN, so that every product with it is NaN. If steps /
// max|x| overflows (only for max|x| < 1e-34) the group counts as zeros.
template <int steps>
struct Group {
  I q0, q1;
  float scale;
};

template <int steps>
DSO_INLINE Group<steps> quantize(F x0, F x1) {
  const float top = largest(max(abs(x0), abs(x1)));
  const float inverse = (float)steps / top;
  if (any_nan(x0) || any_nan(x1) || top == __builtin_inff()) return {izero(), izero(), __builtin_nanf("")};
  if (inverse > 3.4028234664e38f) return {izero(), izero(), 0.0f};
  return {to_int(mul(x0, set(inverse))), to_int(mul(x1, set(inverse))), top / (float)steps};
}

// The parts of a row of `width` (padded to 32) columns.
DSO_INLINE int64_t padded(int64_t width) { return (width + 31) & ~(int64_t)31; }
template <int kind>
DSO_INLINE int64_t scales_at(int64_t padded_width) {
  return padded_width * (kind == DSO_SLOT_Q16 ? 2 : 1);
}

template <int kind>
DSO_INLINE void convert_groups(const float* x, int64_t begin, int64_t end, int64_t width, uint8_t* row) {
  const int64_t wp = padded(width);
  float* scales = (float*)(row + scales_at<kind>(wp));
  int32_t* sums = (int32_t*)(scales + wp / 32);
  x -= begin;
  for (int64_t c = begin; c < end; c += 32) {
    F x0, x1;
    if (c + 32 <= end) {
      x0 = load(x + c);
      x1 = load(x + c + 16);
    } else {
      const int64_t n = end - c;
      x0 = load(x + c, n);
      x1 = n > 16 ? load(x + c + 16, n - 16) : zero();
    }
    if constexpr (kind == DSO_SLOT_BF16) {
      store_bf16(row + 2 * c, x0);
      store_bf16(row + 2 * c + 32, x1);
    } else {
      const auto group = quantize<kind == DSO_SLOT_Q16 ? 32512 : 127>(x0, x1);
      if constexpr (kind == DSO_SLOT_Q16) {
        const I h0 = sar<8>(iadd(group.q0, iset(128))), h1 = sar<8>(iadd(group.q1, iset(128)));
        store_i8(row + c, h0);
        store_i8(row + c + 16, h1);
        store_i8(row + wp + c, isub(group.q0, shl<8>(h0)));
        store_i8(row + wp + c + 16, isub(group.q1, shl<8>(h1)));
      } else {
        store_i8(row + c, group.q0);
        store_i8(row + c + 16, group.q1);
      }
      scales[c / 32] = group.scale;
      sums[c / 32] = isum(iadd(group.q0, group.q1));
    }
  }
}

// The numbers that a row of Q8 or Q16 stands for: Q8 as a row of BF16, Q16 as one of F32; out has room for whole groups.
static void restore(int32_t kind, const void* row, int64_t width, void* out) {
  const uint8_t* r = (const uint8_t*)row;
  const int64_t wp = padded(width);
  const bool wide = kind == DSO_SLOT_Q16;
  const float* scales = (const float*)(r + (wide ? scales_at<DSO_SLOT_Q16>(wp) : scales_at<DSO_SLOT_Q8>(wp)));
  for (int64_t c = 0; c < wp; c += 16) {
    const F scale = set(scales[c / 32]);
    if (wide)
      store((float*)out + c, mul(to_float(iadd(shl<8>(load_i8(r + c)), load_i8(r + wp + c))), scale));
    else
      store_bf16((uint16_t*)out + c, mul(to_float(load_i8(r + c)), scale));  // the same bits on every ISA
  }
}

static void convert(int32_t kind, const float* x, int64_t begin, int64_t end, int64_t width, void* row) {
  uint8_t* r = (uint8_t*)row;
  switch (kind) {
    case DSO_SLOT_BF16:
      return convert_groups<DSO_SLOT_BF16>(x, begin, end, width, r);
    case DSO_SLOT_Q8:
      return convert_groups<DSO_SLOT_Q8>(x, begin, end, width, r);
    case DSO_SLOT_Q16:
      return convert_groups<DSO_SLOT_Q16>(x, begin, end, width, r);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
