// Lane operations that only training needs: bits of floats, 16-bit integers, roots, sums in double.
#pragma once
#include "lanes.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE I bits(F x) { return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)}; }
DSO_INLINE F from_bits(I x) { return {_mm256_castsi256_ps(x.lo), _mm256_castsi256_ps(x.hi)}; }
DSO_INLINE I iand(I a, I b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
DSO_INLINE I ixor(I a, I b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
DSO_INLINE I imul(I a, I b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }  // the low 32 bits
template <int n>
DSO_INLINE I shr(I a) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
DSO_INLINE I count_up() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }
DSO_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.lo), _mm256_sqrt_ps(x.hi)}; }
DSO_INLINE F floor(F x) { return {_mm256_floor_ps(x.lo), _mm256_floor_ps(x.hi)}; }
DSO_INLINE F where_nan(F a, F x, F y) {  // a is NaN ? x : y
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}

DSO_INLINE I load_u16(const void* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
DSO_INLINE I load_i16(const void* p) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
DSO_INLINE void store_16(void* p, I x) {  // the low halves
  const __m256i low = _mm256_set1_epi32(0xffff),
                packed = _mm256_packus_epi32(_mm256_and_si256(x.lo, low), _mm256_and_si256(x.hi, low));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
DSO_INLINE void store_u8(void* p, I x) {  // the values must fit
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.lo, x.hi), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

struct D {
  __m256d part[4];
};  // 16 doubles
DSO_INLINE D no_squares() { return {{_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}}; }
DSO_INLINE D add_squares(D sums, F x) {  // products are exact
  const __m128 quarter[4] = {_mm256_castps256_ps128(x.lo), _mm256_extractf128_ps(x.lo, 1), _mm256_castps256_ps128(x.hi),
                             _mm256_extractf128_ps(x.hi, 1)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256d v = _mm256_cvtps_pd(quarter[i]);
    sums.part[i] = _mm256_fmadd_pd(v, v, sums.part[i]);
  }
  return sums;
}
DSO_INLINE void store(double* p, D x) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, x.part[i]);
}

}  // namespace dso::DSO_ISA_NAMESPACE
