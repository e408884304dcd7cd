// Dot products of 16-bit words, without VNNI: for codes whose products with bytes pmaddubsw cannot add without saturation, and
// for 16-bit activations, which bytes would multiply in two passes. Sums are exact: the same bits as by generic/linear_int.hpp.
#pragma once
#include <cstdint>

#include "dso.h"

namespace dso::DSO_ISA_NAMESPACE {

// The activations of a group of 32 columns: those of even columns, then those of odd ones.
struct GroupWords {
  alignas(32) int16_t even[16], odd[16];
};
template <int kind>
DSO_INLINE void read_words(GroupWords& to, const uint8_t* x, int64_t width) {
  const __m256i codes = _mm256_loadu_si256((const __m256i*)x);
  __m256i even = _mm256_slli_epi16(codes, 8), odd;
  if constexpr (kind == DSO_SLOT_Q16) {  // bytes 256 * high + low, both signed
    const __m256i low = _mm256_loadu_si256((const __m256i*)(x + width));
    even = _mm256_add_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8));
    odd = _mm256_add_epi16(_mm256_and_si256(codes, _mm256_set1_epi16((short)0xff00)), _mm256_srai_epi16(low, 8));
  } else {
    even = _mm256_srai_epi16(even, 8);
    odd = _mm256_srai_epi16(codes, 8);
  }
  _mm256_store_si256((__m256i*)to.even, even);
  _mm256_store_si256((__m256i*)to.odd, odd);
}

// The same as group_dots() of generic/linear_int.hpp, which this replaces where its constraint holds.
template <class W, int kind, int first, int quads, int M, int N, class Place>
  requires(!has_dot_int && (W::largest > 127 || (kind == DSO_SLOT_Q16 && W::largest > 31)))
DSO_INLINE void group_dots(I (&dot)[M][N], const I (&start)[M], Place w, int64_t row_bytes, const uint8_t* x, int64_t stride,
                           int64_t width) {
  GroupWords words[M];
  for (int m = 0; m < M; ++m) {
    read_words<kind>(words[m], x + m * stride, width);
    for (int n = 0; n < N; ++n) dot[m][n] = start[m];
  }
  __asm__("" : : : "memory");  // broadcasts are loads then, not moves between registers
#pragma GCC unroll 8
  for (int i = 0; i < quads; ++i) {
    for (int n = 0; n < N; ++n) {
      const B b = W::quad(w.rows_below(n * row_bytes), first + i), even = even_words(b), odd = odd_words(b);
      for (int m = 0; m < M; ++m) {
        I& sum = dot[m][n];
        compute_now(sum = dot_words(sum, even, broadcast4(words[m].even + 2 * (first + i))));
        compute_now(sum = dot_words(sum, odd, broadcast4(words[m].odd + 2 * (first + i))));
      }
    }
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
