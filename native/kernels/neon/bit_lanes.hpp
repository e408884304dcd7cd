// Lane operations that only training needs: bits of floats, 16-bit integers, roots, sums in double. As in avx2/bit_lanes.hpp.
#pragma once
#include "lanes.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE I bits(F x) {
  return {vreinterpretq_s32_f32(x.q0), vreinterpretq_s32_f32(x.q1), vreinterpretq_s32_f32(x.q2), vreinterpretq_s32_f32(x.q3)};
}
DSO_INLINE F from_bits(I x) {
  return {vreinterpretq_f32_s32(x.q0), vreinterpretq_f32_s32(x.q1), vreinterpretq_f32_s32(x.q2), vreinterpretq_f32_s32(x.q3)};
}
DSO_BINARY(iand, I, vandq_s32)
DSO_BINARY(ixor, I, veorq_s32)
DSO_BINARY(imul, I, vmulq_s32)  // the low 32 bits
template <int n>
DSO_INLINE int32x4_t shr_quarter(int32x4_t a) {
  return from_u32(vshrq_n_u32(as_u32(a), n));
}
template <int n>
DSO_INLINE I shr(I a) {
  return {shr_quarter<n>(a.q0), shr_quarter<n>(a.q1), shr_quarter<n>(a.q2), shr_quarter<n>(a.q3)};
}
DSO_INLINE F sqrt(F x) { return {vsqrtq_f32(x.q0), vsqrtq_f32(x.q1), vsqrtq_f32(x.q2), vsqrtq_f32(x.q3)}; }
DSO_INLINE F floor(F x) { return {vrndmq_f32(x.q0), vrndmq_f32(x.q1), vrndmq_f32(x.q2), vrndmq_f32(x.q3)}; }
DSO_INLINE F where_nan(F a, F x, F y) {  // a is NaN ? x : y
#define DSO_EACH(q) vbslq_f32(vceqq_f32(a.q, a.q), y.q, x.q)
  return DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
}

DSO_INLINE I load_u16(const void* p) {
  const uint16x8_t low = vld1q_u16((const uint16_t*)p), high = vld1q_u16((const uint16_t*)p + 8);
  return {from_u32(vmovl_u16(vget_low_u16(low))), from_u32(vmovl_high_u16(low)), from_u32(vmovl_u16(vget_low_u16(high))),
          from_u32(vmovl_high_u16(high))};
}
DSO_INLINE I load_i16(const void* p) {
  const int16x8_t low = vld1q_s16((const int16_t*)p), high = vld1q_s16((const int16_t*)p + 8);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
DSO_INLINE void store_16(void* p, I x) {  // the low halves
  vst1q_s16((int16_t*)p, vmovn_high_s32(vmovn_s32(x.q0), x.q1));
  vst1q_s16((int16_t*)p + 8, vmovn_high_s32(vmovn_s32(x.q2), x.q3));
}
DSO_INLINE void store_u8(void* p, I x) { store_i8(p, x); }  // the values must fit

struct D {
  float64x2_t part[8];
};  // 16 doubles
DSO_INLINE D no_squares() {
  const float64x2_t none = vdupq_n_f64(0);
  return {{none, none, none, none, none, none, none, none}};
}
DSO_INLINE D add_squares(D sums, F x) {  // products are exact
  const float32x4_t quarter[4] = {x.q0, x.q1, x.q2, x.q3};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float64x2_t low = vcvt_f64_f32(vget_low_f32(quarter[i])), high = vcvt_high_f64_f32(quarter[i]);
    sums.part[2 * i] = vfmaq_f64(sums.part[2 * i], low, low);
    sums.part[2 * i + 1] = vfmaq_f64(sums.part[2 * i + 1], high, high);
  }
  return sums;
}
DSO_INLINE void store(double* p, D x) {
  for (int i = 0; i < 8; ++i) vst1q_f64(p + 2 * i, x.part[i]);
}

}  // namespace dso::DSO_ISA_NAMESPACE
