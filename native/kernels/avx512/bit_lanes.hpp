// Lane operations that only training needs: bits of floats, 16-bit integers, roots, sums in double. As in avx2/bit_lanes.hpp.
#pragma once
#include "lanes.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE I bits(F x) { return _mm512_castps_si512(x); }
DSO_INLINE F from_bits(I x) { return _mm512_castsi512_ps(x); }
DSO_INLINE I iand(I a, I b) { return _mm512_and_si512(a, b); }
DSO_INLINE I ixor(I a, I b) { return _mm512_xor_si512(a, b); }
DSO_INLINE I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }  // the low 32 bits
template <int n>
DSO_INLINE I shr(I a) {
  return _mm512_srli_epi32(a, n);
}
DSO_INLINE I count_up() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
DSO_INLINE F sqrt(F x) { return _mm512_sqrt_ps(x); }
DSO_INLINE F floor(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
DSO_INLINE F where_nan(F a, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), y, x);
}  // a is NaN ? x : y

DSO_INLINE I load_u16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
DSO_INLINE I load_i16(const void* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
DSO_INLINE void store_16(void* p, I x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }  // the low halves
DSO_INLINE void store_u8(void* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }      // the values must fit

struct D {
  __m512d lo, hi;
};  // 16 doubles
DSO_INLINE D no_squares() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
DSO_INLINE D add_squares(D sums, F x) {  // products are exact
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return {_mm512_fmadd_pd(lo, lo, sums.lo), _mm512_fmadd_pd(hi, hi, sums.hi)};
}
DSO_INLINE void store(double* p, D x) {
  _mm512_storeu_pd(p, x.lo);
  _mm512_storeu_pd(p + 8, x.hi);
}

}  // namespace dso::DSO_ISA_NAMESPACE
