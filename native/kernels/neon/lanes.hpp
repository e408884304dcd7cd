// The SIMD lane type on NEON (ARMv8.0; dot products, i8mm and bf16 if the translation unit has them): the names of
// avx512/lanes.hpp over four 128-bit registers. Ordered float operations and integer dot products are bitwise equal to those
// on x86, also where NEON's own instructions differ: maxima of NaN, and conversions of what an int32 cannot hold.
#ifndef DSO_NEON_LANES_HPP  // not #pragma once: test_lanes includes it for several ISAs
#define DSO_NEON_LANES_HPP
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace dso::DSO_ISA_NAMESPACE {
#define DSO_INLINE static inline __attribute__((always_inline))
// Applies an expression of the quarter `_` to all four.
#define DSO_QUARTERS(expression) {expression(q0), expression(q1), expression(q2), expression(q3)}

struct F {
  float32x4_t q0, q1, q2, q3;
};  // 16 x f32
struct I {
  int32x4_t q0, q1, q2, q3;
};  // 16 x i32
using B = I;  // 64 bytes: 16 lanes of 4
constexpr int lanes = 16;
constexpr int registers = 8;  // of four

DSO_INLINE uint8x16_t as_u8(int32x4_t x) { return vreinterpretq_u8_s32(x); }
DSO_INLINE int8x16_t as_s8(int32x4_t x) { return vreinterpretq_s8_s32(x); }
DSO_INLINE uint16x8_t as_u16(int32x4_t x) { return vreinterpretq_u16_s32(x); }
DSO_INLINE uint32x4_t as_u32(int32x4_t x) { return vreinterpretq_u32_s32(x); }
DSO_INLINE int32x4_t from_u8(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
DSO_INLINE int32x4_t from_u16(uint16x8_t x) { return vreinterpretq_s32_u16(x); }
DSO_INLINE int32x4_t from_u32(uint32x4_t x) { return vreinterpretq_s32_u32(x); }

DSO_INLINE I count_up() {
  const int32x4_t k = {0, 1, 2, 3};
  return {k, vaddq_s32(k, vdupq_n_s32(4)), vaddq_s32(k, vdupq_n_s32(8)), vaddq_s32(k, vdupq_n_s32(12))};
}
DSO_INLINE I first(int64_t n) {  // all ones in the first n lanes
  const I k = count_up();
  const int32x4_t m = vdupq_n_s32(n >= 16 ? 16 : (int32_t)n);
#define DSO_EACH(q) from_u32(vcgtq_s32(m, k.q))
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}

// ---- float
DSO_INLINE F set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x), vdupq_n_f32(x)}; }
DSO_INLINE F zero() { return set(0); }
DSO_INLINE F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
DSO_INLINE void store(float* p, F x) {
  vst1q_f32(p, x.q0);
  vst1q_f32(p + 4, x.q1);
  vst1q_f32(p + 8, x.q2);
  vst1q_f32(p + 12, x.q3);
}
DSO_INLINE F load(const float* p, int64_t n) {  // the rest is zero
  if (n >= 16) return load(p);
  alignas(64) float some[16] = {};
  if (n > 0) memcpy(some, p, 4 * (size_t)n);
  return load(some);
}
DSO_INLINE void store(float* p, F x, int64_t n) {
  if (n >= 16) return store(p, x);
  alignas(64) float some[16];
  store(some, x);
  if (n > 0) memcpy(p, some, 4 * (size_t)n);
}
#define DSO_BINARY(name, type, instruction)                                                                      \
  DSO_INLINE type name(type a, type b) {                                                                         \
    return {instruction(a.q0, b.q0), instruction(a.q1, b.q1), instruction(a.q2, b.q2), instruction(a.q3, b.q3)}; \
  }
DSO_BINARY(add, F, vaddq_f32)
DSO_BINARY(sub, F, vsubq_f32)
DSO_BINARY(mul, F, vmulq_f32)
DSO_BINARY(div, F, vdivq_f32)
DSO_INLINE F fma(F a, F b, F c) {  // a*b + c
#define DSO_EACH(q) vfmaq_f32(c.q, a.q, b.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_INLINE F fnma(F a, F b, F c) {  // c - a*b
#define DSO_EACH(q) vfmsq_f32(c.q, a.q, b.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
// b where either is NaN, which FMAX and FMIN would return.
DSO_INLINE float32x4_t max_quarter(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
DSO_INLINE float32x4_t min_quarter(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
DSO_BINARY(max, F, max_quarter)
DSO_BINARY(min, F, min_quarter)
DSO_INLINE F less(F a, F b, F x, F y) {  // a < b ? x : y
#define DSO_EACH(q) vbslq_f32(vcltq_f32(a.q, b.q), x.q, y.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_INLINE F abs(F a) { return {vabsq_f32(a.q0), vabsq_f32(a.q1), vabsq_f32(a.q2), vabsq_f32(a.q3)}; }
DSO_INLINE F round(F a) { return {vrndnq_f32(a.q0), vrndnq_f32(a.q1), vrndnq_f32(a.q2), vrndnq_f32(a.q3)}; }  // half to even
// a * 2^n, n integral, |n| <= 252: two factors, so that only the last multiplication can round, overflow or underflow.
DSO_INLINE float32x4_t scale2_quarter(float32x4_t a, float32x4_t n) {
  const int32x4_t bias = vdupq_n_s32(127), i = vcvtnq_s32_f32(n), h = vshrq_n_s32(i, 1);
  const int32x4_t first = vshlq_n_s32(vaddq_s32(h, bias), 23), second = vshlq_n_s32(vaddq_s32(vsubq_s32(i, h), bias), 23);
  return vmulq_f32(vmulq_f32(a, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}
DSO_BINARY(scale2, F, scale2_quarter)
// Fixed trees: the same order on every ISA. (i, i+8), (i, i+4), (i, i+2), (i, i+1).
DSO_INLINE float sum(F a) {
  const float32x4_t x = vaddq_f32(vaddq_f32(a.q0, a.q2), vaddq_f32(a.q1, a.q3));
  const float32x2_t y = vadd_f32(vget_low_f32(x), vget_high_f32(x));
  return vget_lane_f32(y, 0) + vget_lane_f32(y, 1);
}
DSO_INLINE float largest(F a) {
  const float32x4_t x = max_quarter(max_quarter(a.q0, a.q2), max_quarter(a.q1, a.q3)), y = max_quarter(x, vextq_f32(x, x, 2));
  return vgetq_lane_f32(max_quarter(y, vrev64q_f32(y)), 0);
}
DSO_INLINE F keep(F a, int64_t lo, int64_t hi, F other) {  // lanes [lo, hi) of a, the others of `other`; any lo and hi
  const I l = first(lo < 0 ? 0 : lo), h = first(hi < 0 ? 0 : hi);
#define DSO_EACH(q) vbslq_f32(as_u32(vbicq_s32(h.q, l.q)), a.q, other.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
// Lanes i and i + h, where bit h of i is not set, become their sum and difference.
template <int h>
DSO_INLINE float32x4_t butterfly_quarter(float32x4_t a) {
  constexpr uint32_t all = ~0u;
  const float32x4_t other = h == 2 ? vextq_f32(a, a, 2) : vrev64q_f32(a);
  const uint32x4_t second = h == 2 ? uint32x4_t{0, 0, all, all} : uint32x4_t{0, all, 0, all};
  return vbslq_f32(second, vsubq_f32(other, a), vaddq_f32(a, other));
}
template <int h>
DSO_INLINE F butterfly(F a) {
  if constexpr (h == 8)
    return {vaddq_f32(a.q0, a.q2), vaddq_f32(a.q1, a.q3), vsubq_f32(a.q0, a.q2), vsubq_f32(a.q1, a.q3)};
  else if constexpr (h == 4)
    return {vaddq_f32(a.q0, a.q1), vsubq_f32(a.q0, a.q1), vaddq_f32(a.q2, a.q3), vsubq_f32(a.q2, a.q3)};
  else
    return {butterfly_quarter<h>(a.q0), butterfly_quarter<h>(a.q1), butterfly_quarter<h>(a.q2), butterfly_quarter<h>(a.q3)};
}
DSO_INLINE uint32_t at_least(F a, F b) {  // bit i: a >= b in lane i
  const uint32x4_t bit0 = {1, 2, 4, 8};
  const uint32x4_t low =
      vorrq_u32(vandq_u32(vcgeq_f32(a.q0, b.q0), bit0), vandq_u32(vcgeq_f32(a.q1, b.q1), vshlq_n_u32(bit0, 4)));
  const uint32x4_t high = vorrq_u32(vandq_u32(vcgeq_f32(a.q2, b.q2), vshlq_n_u32(bit0, 8)),
                                    vandq_u32(vcgeq_f32(a.q3, b.q3), vshlq_n_u32(bit0, 12)));
  return vaddvq_u32(vorrq_u32(low, high));
}
DSO_INLINE bool any_nan(F a) {
  const uint32x4_t low = vandq_u32(vceqq_f32(a.q0, a.q0), vceqq_f32(a.q1, a.q1)),
                   high = vandq_u32(vceqq_f32(a.q2, a.q2), vceqq_f32(a.q3, a.q3));
  return vminvq_u32(vandq_u32(low, high)) == 0;
}

// ---- 16-bit floats in memory
DSO_INLINE float32x4_t bf16_quarter(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
DSO_INLINE F load_bf16(const void* p) {
  const uint16_t* const x = (const uint16_t*)p;
  return {bf16_quarter(x), bf16_quarter(x + 4), bf16_quarter(x + 8), bf16_quarter(x + 12)};
}
DSO_INLINE F widened_f16(uint16x8_t low, uint16x8_t high) {
  const float16x8_t l = vreinterpretq_f16_u16(low), h = vreinterpretq_f16_u16(high);
  return {vcvt_f32_f16(vget_low_f16(l)), vcvt_high_f32_f16(l), vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
DSO_INLINE F load_f16(const void* p) { return widened_f16(vld1q_u16((const uint16_t*)p), vld1q_u16((const uint16_t*)p + 8)); }
DSO_INLINE F load_e5m3(const void* p) {  // 16 bytes: fp16 without the sign and the 7 last bits
  const uint8x16_t x = vld1q_u8((const uint8_t*)p);
  return widened_f16(vshll_n_u8(vget_low_u8(x), 7), vshll_high_n_u8(x, 7));
}
DSO_INLINE uint16x8_t power_bits(uint16x8_t b) {  // the upper halves of 2^(b - 128)
  // b - 1 is the exponent, except of the subnormals, which begin with 32 and 64.
  const uint16x8_t normal = vqsubq_u16(vshlq_n_u16(b, 7), vdupq_n_u16(0x80));
  const uint16x8_t subnormal = vaddq_u16(vshlq_n_u16(b, 5), vdupq_n_u16(0x20));  // smaller for other b
  return vmaxq_u16(normal, subnormal);
}
DSO_INLINE F load_e8(const void* p) {  // 16 bytes b: 2^(b - 128)
  const uint8x16_t x = vld1q_u8((const uint8_t*)p);
  const uint16x8_t low = power_bits(vmovl_u8(vget_low_u8(x))), high = power_bits(vmovl_high_u8(x));
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(high, 16))};
}
// In the upper halves: nearest even, NaN as quiet NaN; denormals are preserved.
DSO_INLINE uint32x4_t bf16_bits(float32x4_t x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(vdupq_n_u32(0x7fff), odd));
  return vbslq_u32(vceqq_f32(x, x), r, vorrq_u32(u, vdupq_n_u32(0x400000)));
}
DSO_INLINE void store_bf16(void* p, F x) {
  uint16_t* const to = (uint16_t*)p;
  vst1q_u16(to, vcombine_u16(vshrn_n_u32(bf16_bits(x.q0), 16), vshrn_n_u32(bf16_bits(x.q1), 16)));
  vst1q_u16(to + 8, vcombine_u16(vshrn_n_u32(bf16_bits(x.q2), 16), vshrn_n_u32(bf16_bits(x.q3), 16)));
}
DSO_INLINE float from_f16(uint16_t x) {
  __fp16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}
DSO_INLINE uint16_t to_f16(float x) {  // half to even
  const __fp16 h = (__fp16)x;
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
DSO_INLINE void to_f16(const float* x, uint16_t* h) {  // 16 values, half to even
  for (int i = 0; i < 16; i += 4) vst1_u16(h + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
}

// ---- int32
DSO_INLINE I iset(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}; }
DSO_INLINE I izero() { return iset(0); }
DSO_BINARY(iadd, I, vaddq_s32)
DSO_BINARY(isub, I, vsubq_s32)
template <int n>
DSO_INLINE I shl(I a) {
  return {vshlq_n_s32(a.q0, n), vshlq_n_s32(a.q1, n), vshlq_n_s32(a.q2, n), vshlq_n_s32(a.q3, n)};
}
template <int n>
DSO_INLINE I sar(I a) {
  return {vshrq_n_s32(a.q0, n), vshrq_n_s32(a.q1, n), vshrq_n_s32(a.q2, n), vshrq_n_s32(a.q3, n)};
}
DSO_INLINE F to_float(I a) { return {vcvtq_f32_s32(a.q0), vcvtq_f32_s32(a.q1), vcvtq_f32_s32(a.q2), vcvtq_f32_s32(a.q3)}; }
// Half to even; NaN and what an int32 cannot hold become INT32_MIN: FCVTNS would return 0 and INT32_MAX.
DSO_INLINE int32x4_t to_int_quarter(float32x4_t a) {
  return vbslq_s32(vcltq_f32(a, vdupq_n_f32(2147483648.0f)), vcvtnq_s32_f32(a), vdupq_n_s32(INT32_MIN));
}
DSO_INLINE I to_int(F a) { return {to_int_quarter(a.q0), to_int_quarter(a.q1), to_int_quarter(a.q2), to_int_quarter(a.q3)}; }
DSO_INLINE I widened_i8(int8x16_t x) {
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
DSO_INLINE I load_i8(const void* p) { return widened_i8(vld1q_s8((const int8_t*)p)); }  // 16 signed bytes
DSO_INLINE I load_u8(const void* p) {                                                   // 16 unsigned bytes
  const uint8x16_t x = vld1q_u8((const uint8_t*)p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {from_u32(vmovl_u16(vget_low_u16(low))), from_u32(vmovl_high_u16(low)), from_u32(vmovl_u16(vget_low_u16(high))),
          from_u32(vmovl_high_u16(high))};
}
DSO_INLINE int8x16_t narrowed(I a) {  // the low bytes
  const int16x8_t low = vmovn_high_s32(vmovn_s32(a.q0), a.q1), high = vmovn_high_s32(vmovn_s32(a.q2), a.q3);
  return vmovn_high_s16(vmovn_s16(low), high);
}
DSO_INLINE void store_i8(void* p, I a) { vst1q_s8((int8_t*)p, narrowed(a)); }  // the values must fit
DSO_INLINE int32_t isum(I a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.q0, a.q1), vaddq_s32(a.q2, a.q3))); }

// ---- bytes and dot products. A lane's 4 bytes are 4 consecutive columns; products are exact on every ISA.
DSO_INLINE B load_bytes(const void* p) {
  const uint8_t* const x = (const uint8_t*)p;
  return {from_u8(vld1q_u8(x)), from_u8(vld1q_u8(x + 16)), from_u8(vld1q_u8(x + 32)), from_u8(vld1q_u8(x + 48))};
}
DSO_INLINE void store_bytes(void* p, B x) {
  uint8_t* const to = (uint8_t*)p;
  vst1q_u8(to, as_u8(x.q0));
  vst1q_u8(to + 16, as_u8(x.q1));
  vst1q_u8(to + 32, as_u8(x.q2));
  vst1q_u8(to + 48, as_u8(x.q3));
}
DSO_INLINE B broadcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return iset(v);
}
// Of each byte, bits [from, from + count) as bits [to, to + count); all others are 0. Constants, once loops are unrolled.
DSO_INLINE int32x4_t move_bits_quarter(int32x4_t x, int from, int to, int count) {
  uint8x16_t b = as_u8(x);
  if (from > to) b = b >> (from - to);
  if (from < to) b = b << (to - from);
  const bool clean = from > to ? to == 0 && from + count == 8 : from < to ? from == 0 && to + count == 8 : count == 8;
  return from_u8(clean ? b : vandq_u8(b, vdupq_n_u8((uint8_t)(((1 << count) - 1) << to))));
}
DSO_INLINE B move_bits(B x, int from, int to, int count) {
#define DSO_EACH(q) move_bits_quarter(x.q, from, to, count)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_BINARY(xor_bits, B, veorq_s32)
DSO_BINARY(join_bits, B, vorrq_s32)
DSO_INLINE B select_bits(int mask, B a, B b) {  // of each byte, the bits of a where `mask` has ones, and of b elsewhere
  const uint32x4_t m = vreinterpretq_u32_u8(vdupq_n_u8((uint8_t)mask));
#define DSO_EACH(q) vbslq_s32(m, a.q, b.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
template <int n>
DSO_INLINE int32x4_t rotate_quarter(int32x4_t x) {
  const uint32x4_t u = as_u32(x);
  return from_u32(vsriq_n_u32(vshlq_n_u32(u, n), u, 32 - n));
}
template <int n>
DSO_INLINE B rotate(B x) {  // lanes, towards their upper bits
  return {rotate_quarter<n>(x.q0), rotate_quarter<n>(x.q1), rotate_quarter<n>(x.q2), rotate_quarter<n>(x.q3)};
}
DSO_INLINE B look_up(const uint8_t (&table)[16], B codes) {  // table[code] of each byte, code < 16
  const uint8x16_t t = vld1q_u8(table);
#define DSO_EACH(q) from_u8(vqtbl1q_u8(t, as_u8(codes.q)))
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
// table[low 4 bits] and table[high 4 bits] of each of 16 bytes.
DSO_INLINE void look_up_halves(const int8_t (&table)[16], const void* p, I& low, I& high) {
  const int8x16_t t = vld1q_s8(table);
  const uint8x16_t x = vld1q_u8((const uint8_t*)p);
  low = widened_i8(vqtbl1q_s8(t, vandq_u8(x, vdupq_n_u8(15))));
  high = widened_i8(vqtbl1q_s8(t, vshrq_n_u8(x, 4)));
}
// The same as two 16-bit elements per lane, the low one first. The table occurs twice.
DSO_INLINE B look_up_pairs(const uint16_t (&table)[32], const void* p) {
  const uint8x16x2_t t = vld2q_u8((const uint8_t*)table);  // the low and the high bytes
  const uint8x16_t x = vld1q_u8((const uint8_t*)p), low = vandq_u8(x, vdupq_n_u8(15)), high = vshrq_n_u8(x, 4);
  const uint8x16_t first = vzip1q_u8(low, high), second = vzip2q_u8(low, high);
  const uint8x16_t first_low = vqtbl1q_u8(t.val[0], first), first_high = vqtbl1q_u8(t.val[1], first);
  const uint8x16_t second_low = vqtbl1q_u8(t.val[0], second), second_high = vqtbl1q_u8(t.val[1], second);
  return {from_u8(vzip1q_u8(first_low, first_high)), from_u8(vzip2q_u8(first_low, first_high)),
          from_u8(vzip1q_u8(second_low, second_high)), from_u8(vzip2q_u8(second_low, second_high))};
}
DSO_INLINE I sum16_i8(const void* p) { return iset(vaddlvq_s8(vld1q_s8((const int8_t*)p))); }  // in every lane

// dot_u7: w: u8 <= 127, a: s8. dot_u8: the same of w - dot_bias, w any u8: without a mixed product (i8mm), codes are made
// signed.
constexpr bool has_dot_int = true;
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int32_t dot_bias = 0;
DSO_INLINE int32x4_t dot_u8_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) { return vusdotq_s32(acc, as_u8(w), as_s8(a)); }
DSO_INLINE int32x4_t dot_u7_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) { return dot_u8_quarter(acc, w, a); }
#else
constexpr int32_t dot_bias = 128;
#ifdef __ARM_FEATURE_DOTPROD
DSO_INLINE int32x4_t dot_u7_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) { return vdotq_s32(acc, as_s8(w), as_s8(a)); }
DSO_INLINE int32x4_t dot_u8_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) {
  return dot_u7_quarter(acc, from_u8(veorq_u8(as_u8(w), vdupq_n_u8(128))), a);
}
#else
DSO_INLINE int32x4_t dot_u7_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) {  // pairs <= 2*127*128 fit in 16 bits
  const int16x8_t low = vmull_s8(vget_low_s8(as_s8(w)), vget_low_s8(as_s8(a))), high = vmull_high_s8(as_s8(w), as_s8(a));
  return vpadalq_s16(acc, vpaddq_s16(low, high));
}
DSO_INLINE int32x4_t dot_u8_quarter(int32x4_t acc, int32x4_t w, int32x4_t a) {  // pairs <= 2*128*128 do not
  const int8x16_t s = as_s8(from_u8(veorq_u8(as_u8(w), vdupq_n_u8(128))));
  const int16x8_t low = vmull_s8(vget_low_s8(s), vget_low_s8(as_s8(a))), high = vmull_high_s8(s, as_s8(a));
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
#endif
DSO_INLINE I dot_u7(I acc, B w, B a) {
#define DSO_EACH(q) dot_u7_quarter(acc.q, w.q, a.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_INLINE I dot_u8(I acc, B w, B a) {
#define DSO_EACH(q) dot_u8_quarter(acc.q, w.q, a.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
// Sums in 16 bits, which are cheaper elsewhere, are no different here.
DSO_INLINE I pairs_u7(I acc, B w, B a) { return dot_u7(acc, w, a); }
DSO_INLINE I add_pairs(I acc) { return acc; }
// A lane's two bf16 elements as floats, and back (the upper 16 bits: for values that are bf16 already).
DSO_INLINE float32x4_t even_bf16_quarter(int32x4_t x) { return vreinterpretq_f32_s32(vshlq_n_s32(x, 16)); }
DSO_INLINE float32x4_t odd_bf16_quarter(int32x4_t x) {
  return vreinterpretq_f32_s32(vandq_s32(x, vdupq_n_s32((int)0xffff0000)));
}
DSO_INLINE F even_bf16(B x) {
  return {even_bf16_quarter(x.q0), even_bf16_quarter(x.q1), even_bf16_quarter(x.q2), even_bf16_quarter(x.q3)};
}
DSO_INLINE F odd_bf16(B x) {
  return {odd_bf16_quarter(x.q0), odd_bf16_quarter(x.q1), odd_bf16_quarter(x.q2), odd_bf16_quarter(x.q3)};
}
DSO_INLINE int32x4_t pair_bits(uint32x4_t even, uint32x4_t odd) {
  return from_u32(vsriq_n_u32(odd, even, 16));
}  // upper halves
DSO_INLINE B pair_bf16(F even, F odd) {
#define DSO_EACH(q) pair_bits(vreinterpretq_u32_f32(even.q), vreinterpretq_u32_f32(odd.q))
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}

// The low (half 0) or high bytes of 32 words, E4M3 codes, as bf16, each divided by 256: exact, and never subnormal. NaN codes
// do not occur. An fp16 number with E4M3's exponent and mantissa is that code's value divided by 256.
template <int half>
DSO_INLINE int32x4_t expand_e4m3_quarter(int32x4_t codes) {
  int16x8_t code = vreinterpretq_s16_s32(codes);
  if constexpr (half == 0) code = vshlq_n_s16(code, 8);
  const float16x8_t x = vreinterpretq_f16_s16(vandq_s16(vshrq_n_s16(code, 1), vdupq_n_s16((short)0xbf80)));
  return from_u16(
      vuzp2q_u16(vreinterpretq_u16_f32(vcvt_f32_f16(vget_low_f16(x))), vreinterpretq_u16_f32(vcvt_high_f32_f16(x))));
}
template <int half>
DSO_INLINE B expand_e4m3(const void* p) {
  const B x = load_bytes(p);
  return {expand_e4m3_quarter<half>(x.q0), expand_e4m3_quarter<half>(x.q1), expand_e4m3_quarter<half>(x.q2),
          expand_e4m3_quarter<half>(x.q3)};
}

// Two rows of 32 16-bit elements to pairs per column: x holds columns 0-3, 8-11, 16-19 and 24-27, y the others. in_columns
// returns sums over such pairs to columns 0-15 and 16-31.
DSO_INLINE void pair_columns(B a, B b, B& x, B& y) {
#define DSO_EACH(q) from_u16(vzip1q_u16(as_u16(a.q), as_u16(b.q)))
  x = DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
#define DSO_EACH(q) from_u16(vzip2q_u16(as_u16(a.q), as_u16(b.q)))
  y = DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_INLINE void in_columns(F& x, F& y) {
  const F a = x, b = y;
  x = {a.q0, b.q0, a.q1, b.q1};
  y = {a.q2, b.q2, a.q3, b.q3};
}

DSO_INLINE void transpose_quarters(int32x4_t& a, int32x4_t& b, int32x4_t& c, int32x4_t& d) {  // 4 x 4
  const int32x4_t ab = vzip1q_s32(a, b), cd = vzip1q_s32(c, d), ab2 = vzip2q_s32(a, b), cd2 = vzip2q_s32(c, d);
  const auto low = [](int32x4_t x, int32x4_t y) __attribute__((always_inline)) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
  };
  const auto high = [](int32x4_t x, int32x4_t y) __attribute__((always_inline)) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y)));
  };
  a = low(ab, cd), b = high(ab, cd), c = low(ab2, cd2), d = high(ab2, cd2);
}
DSO_INLINE void transpose(B (&x)[16]) {  // 16 x 16 lanes, in blocks of 4 x 4
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    transpose_quarters(x[i].q0, x[i + 1].q0, x[i + 2].q0, x[i + 3].q0);
    transpose_quarters(x[i].q1, x[i + 1].q1, x[i + 2].q1, x[i + 3].q1);
    transpose_quarters(x[i].q2, x[i + 1].q2, x[i + 2].q2, x[i + 3].q2);
    transpose_quarters(x[i].q3, x[i + 1].q3, x[i + 2].q3, x[i + 3].q3);
  }
  const auto swap = [](int32x4_t& a, int32x4_t& b) __attribute__((always_inline)) {
    const int32x4_t t = a;
    a = b, b = t;
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    swap(x[i].q1, x[i + 4].q0), swap(x[i].q2, x[i + 8].q0), swap(x[i].q3, x[i + 12].q0);
    swap(x[i + 4].q2, x[i + 8].q1), swap(x[i + 4].q3, x[i + 12].q1), swap(x[i + 8].q3, x[i + 12].q2);
  }
}
// The block of 4 x 4 at row r and column c of in[rows][cols], to out[cols][rows].
template <int rows, int cols>
DSO_INLINE void transpose4(const float* in, float* out, int r, int c) {
  int32x4_t x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = vreinterpretq_s32_f32(vld1q_f32(in + (r + i) * cols + c));
  transpose_quarters(x[0], x[1], x[2], x[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(out + (c + i) * rows + r, vreinterpretq_f32_s32(x[i]));
}
// scale * (byte - offset) of a word's 4 bytes, with `least` added if has_min.
struct ByteScale {
  float32x4_t scale, least;
  int32x4_t offset;
};
DSO_INLINE ByteScale byte_scale(float scale, float least, int32_t offset) {
  return {vdupq_n_f32(scale), vdupq_n_f32(least), vdupq_n_s32(offset)};
}
template <bool has_min>
DSO_INLINE void scale_bytes(const ByteScale& by, uint32_t word, float* out) {
  const uint16x4_t wide = vget_low_u16(vmovl_u8(vcreate_u8(word)));
  const float32x4_t w = vmulq_f32(by.scale, vcvtq_f32_s32(vsubq_s32(from_u32(vmovl_u16(wide)), by.offset)));
  vst1q_f32(out, has_min ? vaddq_f32(w, by.least) : w);
}

// Two bf16 columns per lane: acc + w0*a0 + w1*a1. Its rounding is specific to the variant (a kernel family is fixed per
// variant).
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
constexpr bool has_dot_bf16 = true;
DSO_INLINE uint16x8_t rounded_bf16(float32x4_t a, float32x4_t b) {
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(a), b));
}
DSO_INLINE void round_bf16(void* p, F x) {
  vst1q_u16((uint16_t*)p, rounded_bf16(x.q0, x.q1));
  vst1q_u16((uint16_t*)p + 8, rounded_bf16(x.q2, x.q3));
}
DSO_INLINE int32x4_t round_pair_quarter(float32x4_t even, float32x4_t odd) {
  const uint16x8_t both = rounded_bf16(even, odd);
  return from_u16(vzip1q_u16(both, vextq_u16(both, both, 4)));
}
DSO_INLINE float32x4_t dot_bf16_quarter(float32x4_t acc, int32x4_t w, int32x4_t a) {
  return vbfdotq_f32(acc, vreinterpretq_bf16_s32(w), vreinterpretq_bf16_s32(a));
}
#else
constexpr bool has_dot_bf16 = false;
DSO_INLINE void round_bf16(void* p, F x) { store_bf16(p, x); }
DSO_INLINE int32x4_t round_pair_quarter(float32x4_t even, float32x4_t odd) {
  return pair_bits(bf16_bits(even), bf16_bits(odd));
}
DSO_INLINE float32x4_t dot_bf16_quarter(float32x4_t acc, int32x4_t w, int32x4_t a) {  // two fmas
  acc = vfmaq_f32(acc, even_bf16_quarter(w), even_bf16_quarter(a));
  return vfmaq_f32(acc, odd_bf16_quarter(w), odd_bf16_quarter(a));
}
#endif
DSO_INLINE B round_pair_bf16(F even, F odd) {
#define DSO_EACH(q) round_pair_quarter(even.q, odd.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
DSO_INLINE F dot_bf16(F acc, B w, B a) {
#define DSO_EACH(q) dot_bf16_quarter(acc.q, w.q, a.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}
}  // namespace dso::DSO_ISA_NAMESPACE
#endif
