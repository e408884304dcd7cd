// The SIMD lane type on AVX2 (FMA, F16C; AVX-VNNI if the translation unit has it): the names of avx512/lanes.hpp over pairs of
// 256-bit registers. Ordered float operations and integer dot products are bitwise equal to those on AVX-512.
#ifndef DSO_AVX2_LANES_HPP  // not #pragma once: test_lanes includes it for several ISAs
#define DSO_AVX2_LANES_HPP
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dso::DSO_ISA_NAMESPACE {
#define DSO_INLINE static inline __attribute__((always_inline))
#include "../x86/small_lanes.inl"

struct F {
  __m256 lo, hi;
};  // 16 x f32
struct I {
  __m256i lo, hi;
};  // 16 x i32
using B = I;  // 64 bytes: 16 lanes of 4
constexpr int lanes = 16;
constexpr int registers = 8;  // pairs

DSO_INLINE I first(int64_t n) {  // all ones in the first n lanes
  const __m256i k = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), m = _mm256_set1_epi32(n >= 16 ? 16 : (int32_t)n);
  return {_mm256_cmpgt_epi32(m, k), _mm256_cmpgt_epi32(m, _mm256_add_epi32(k, _mm256_set1_epi32(8)))};
}

// ---- float
DSO_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
DSO_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DSO_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DSO_INLINE F load(const float* p, int64_t n) {  // the rest is zero
  I m = first(n);
  return {_mm256_maskload_ps(p, m.lo), _mm256_maskload_ps(p + 8, m.hi)};
}
DSO_INLINE void store(float* p, F x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
DSO_INLINE void store(float* p, F x, int64_t n) {
  I m = first(n);
  _mm256_maskstore_ps(p, m.lo, x.lo);
  _mm256_maskstore_ps(p + 8, m.hi, x.hi);
}
DSO_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
DSO_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
DSO_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
DSO_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
DSO_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }  // a*b + c
DSO_INLINE F fnma(F a, F b, F c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}  // c - a*b
DSO_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }  // b where either is NaN
DSO_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
DSO_INLINE F less(F a, F b, F x, F y) {  // a < b ? x : y
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
DSO_INLINE F abs(F a) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}
DSO_INLINE F round(F a) {  // half to even
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n, n integral, |n| <= 252: two factors, so that only the last multiplication can round, overflow or underflow.
DSO_INLINE __m256 scale2_half(__m256 a, __m256 n) {
  const __m256i bias = _mm256_set1_epi32(127), i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(h, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}
DSO_INLINE F scale2(F a, F n) { return {scale2_half(a.lo, n.lo), scale2_half(a.hi, n.hi)}; }
// Fixed trees: the same order on every ISA. (i, i+8), (i, i+4), (i, i+2), (i, i+1).
DSO_INLINE float sum(F a) {
  __m256 y = _mm256_add_ps(a.lo, a.hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DSO_INLINE float largest(F a) {
  __m256 y = _mm256_max_ps(a.lo, a.hi);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
DSO_INLINE F keep(F a, int64_t lo, int64_t hi, F other) {  // lanes [lo, hi) of a, the others of `other`; any lo and hi
  const I l = first(lo < 0 ? 0 : lo), h = first(hi < 0 ? 0 : hi);
  return {_mm256_blendv_ps(other.lo, a.lo, _mm256_castsi256_ps(_mm256_andnot_si256(l.lo, h.lo))),
          _mm256_blendv_ps(other.hi, a.hi, _mm256_castsi256_ps(_mm256_andnot_si256(l.hi, h.hi)))};
}
// Lanes i and i + h, where bit h of i is not set, become their sum and difference.
template <int h>
DSO_INLINE __m256 butterfly_half(__m256 a) {
  const __m256 other = h == 4   ? _mm256_permute2f128_ps(a, a, 0x01)
                       : h == 2 ? _mm256_permute_ps(a, 0x4e)
                                : _mm256_permute_ps(a, 0xb1);
  constexpr int second = h == 4 ? 0xf0 : h == 2 ? 0xcc : 0xaa;
  return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), second);
}
template <int h>
DSO_INLINE F butterfly(F a) {
  if constexpr (h == 8)
    return {_mm256_add_ps(a.lo, a.hi), _mm256_sub_ps(a.lo, a.hi)};
  else
    return {butterfly_half<h>(a.lo), butterfly_half<h>(a.hi)};
}
DSO_INLINE uint32_t at_least(F a, F b) {  // bit i: a >= b in lane i
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)),
            hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
  return (uint32_t)(lo | hi << 8);
}
DSO_INLINE bool any_nan(F a) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))) !=
         0;
}

// ---- 16-bit floats in memory
DSO_INLINE __m256 bf16_half(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
DSO_INLINE F load_bf16(const void* p) { return {bf16_half((const uint16_t*)p), bf16_half((const uint16_t*)p + 8)}; }
DSO_INLINE F load_f16(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
DSO_INLINE F load_e5m3(const void* p) {  // 16 bytes: fp16 without the sign and the 7 last bits
  const __m256i h = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
DSO_INLINE F load_e8(const void* p) {  // 16 bytes b: 2^(b - 128)
  // The upper halves of floats: b - 1 is the exponent, except of the subnormals, which begin with 32 and 64.
  const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i normal = _mm256_subs_epu16(_mm256_slli_epi16(b, 7), _mm256_set1_epi16(0x80));
  const __m256i subnormal = _mm256_add_epi16(_mm256_slli_epi16(b, 5), _mm256_set1_epi16(0x20));  // smaller for other b
  const __m256i upper = _mm256_max_epu16(normal, subnormal);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(upper)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(upper, 1)), 16))};
}
DSO_INLINE __m256i bf16_bits(__m256 x) {  // nearest even in the low halves, NaN as quiet NaN; denormals are preserved
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))), 16);
}
DSO_INLINE void store_bf16(void* p, F x) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(x.lo), bf16_bits(x.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

// ---- int32
DSO_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
DSO_INLINE I iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
DSO_INLINE I iadd(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
DSO_INLINE I isub(I a, I b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
template <int n>
DSO_INLINE I shl(I a) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
template <int n>
DSO_INLINE I sar(I a) {
  return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)};
}
DSO_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
DSO_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }  // half to even
DSO_INLINE I load_i8(const void* p) {                                                      // 16 signed bytes
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
DSO_INLINE I load_u8(const void* p) {  // 16 unsigned bytes
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
DSO_INLINE void store_i8(void* p, I a) {  // the values must fit
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
DSO_INLINE int32_t isum(I a) {
  __m256i y = _mm256_add_epi32(a.lo, a.hi);
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

// ---- bytes and dot products. A lane's 4 bytes are 4 consecutive columns; products are exact on every ISA.
DSO_INLINE B load_bytes(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
DSO_INLINE void store_bytes(void* p, B x) {
  _mm256_storeu_si256((__m256i*)p, x.lo);
  _mm256_storeu_si256((__m256i*)p + 1, x.hi);
}
DSO_INLINE B broadcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return iset(v);
}
// Of each byte, bits [from, from + count) as bits [to, to + count); all others are 0.
// Constants, once loops are unrolled.
DSO_INLINE __m256i move_bits_half(__m256i x, int from, int to, int count) {
  if (from > to) x = _mm256_srli_epi16(x, from - to);
  if (from < to) x = _mm256_slli_epi16(x, to - from);
  return _mm256_and_si256(x, _mm256_set1_epi8((char)(((1 << count) - 1) << to)));
}
DSO_INLINE B move_bits(B x, int from, int to, int count) {
  return {move_bits_half(x.lo, from, to, count), move_bits_half(x.hi, from, to, count)};
}
DSO_INLINE B xor_bits(B a, B b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
DSO_INLINE __m256i select_bits_half(__m256i mask, __m256i a, __m256i b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
DSO_INLINE B select_bits(int mask, B a, B b) {  // of each byte, the bits of a where `mask` has ones, and of b elsewhere
  const __m256i m = _mm256_set1_epi8((char)mask);
  return {select_bits_half(m, a.lo, b.lo), select_bits_half(m, a.hi, b.hi)};
}
template <int n>
DSO_INLINE __m256i rotate_half(__m256i x) {
  return _mm256_or_si256(_mm256_slli_epi32(x, n), _mm256_srli_epi32(x, 32 - n));
}
template <int n>
DSO_INLINE B rotate(B x) {  // lanes, towards their upper bits
  return {rotate_half<n>(x.lo), rotate_half<n>(x.hi)};
}
DSO_INLINE B join_bits(B a, B b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
DSO_INLINE B look_up(const uint8_t (&table)[16], B codes) {  // table[code] of each byte, code < 16
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, codes.lo), _mm256_shuffle_epi8(t, codes.hi)};
}
DSO_INLINE I widened_i8(__m128i x) { return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}; }
// table[low 4 bits] and table[high 4 bits] of each of 16 bytes.
DSO_INLINE void look_up_halves(const int8_t (&table)[16], const void* p, I& low, I& high) {
  const __m128i t = _mm_loadu_si128((const __m128i*)table), x = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15);
  low = widened_i8(_mm_shuffle_epi8(t, _mm_and_si128(x, mask)));
  high = widened_i8(_mm_shuffle_epi8(t, _mm_and_si128(_mm_srli_epi16(x, 4), mask)));
}
// The same as two 16-bit elements per lane, the low one first. The table occurs twice.
DSO_INLINE B look_up_pairs(const uint16_t (&table)[32], const void* p) {
  alignas(32) uint16_t pairs[32];
  for (int i = 0; i < 16; ++i) {
    const uint8_t x = ((const uint8_t*)p)[i];
    pairs[2 * i] = table[x & 15];
    pairs[2 * i + 1] = table[x >> 4];
  }
  return load_bytes(pairs);
}
DSO_INLINE I sum16_i8(const void* p) {  // the sum of 16 signed bytes, in every lane
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  __m128i s = _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), x), _mm_set1_epi16(1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  const __m256i all = _mm256_broadcastd_epi32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  return {all, all};
}

constexpr int32_t dot_bias = 0;  // dot_u8 multiplies w - dot_bias
#ifdef __AVXVNNI__
constexpr bool has_dot_int = true;
DSO_INLINE I dot_u8(I acc, B w, B a) {  // w: any u8, a: s8
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, a.lo), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, a.hi)};
}
DSO_INLINE I dot_u7(I acc, B w, B a) { return dot_u8(acc, w, a); }  // w: u8 <= 127, a: s8
#else
constexpr bool has_dot_int = false;
DSO_INLINE __m256i dot_u7_half(__m256i acc, __m256i w, __m256i a) {  // pairs <= 2*127*128: maddubs cannot saturate
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
DSO_INLINE __m256i dot_u8_half(__m256i acc, __m256i w,
                               __m256i a) {  // even and odd bytes as 16-bit integers: maddubs would saturate
  const __m256i we = _mm256_and_si256(w, _mm256_set1_epi16(255)), wo = _mm256_srli_epi16(w, 8);
  const __m256i ae = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), ao = _mm256_srai_epi16(a, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(we, ae), _mm256_madd_epi16(wo, ao)));
}
DSO_INLINE I dot_u7(I acc, B w, B a) { return {dot_u7_half(acc.lo, w.lo, a.lo), dot_u7_half(acc.hi, w.hi, a.hi)}; }
DSO_INLINE I dot_u8(I acc, B w, B a) { return {dot_u8_half(acc.lo, w.lo, a.lo), dot_u8_half(acc.hi, w.hi, a.hi)}; }
#endif
// The unsigned bytes of even and of odd columns as 16-bit words; and acc + the products of a lane's two words.
DSO_INLINE B even_words(B x) {
  const __m256i low = _mm256_set1_epi16(255);
  return {_mm256_and_si256(x.lo, low), _mm256_and_si256(x.hi, low)};
}
DSO_INLINE B odd_words(B x) { return {_mm256_srli_epi16(x.lo, 8), _mm256_srli_epi16(x.hi, 8)}; }
DSO_INLINE I dot_words(I acc, B w, B a) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo, a.lo)), _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi, a.hi))};
}
// x is computed here. GCC would otherwise compute all products first, for which there are not enough registers.
DSO_INLINE void compute_now(I& x) { __asm__("" : "+x"(x.lo), "+x"(x.hi)); }

// Cheaper sums of dot_u7 without VNNI: 32 16-bit sums, which must not overflow (INT4: at most 8*2*15*128 = 30720 per group).
DSO_INLINE I pairs_u7(I acc, B w, B a) {
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, a.lo)),
          _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, a.hi))};
}
DSO_INLINE I add_pairs(I acc) {
  return {_mm256_madd_epi16(acc.lo, _mm256_set1_epi16(1)), _mm256_madd_epi16(acc.hi, _mm256_set1_epi16(1))};
}

// A lane's two bf16 elements as floats, and back (the upper 16 bits: for values that are bf16 already).
DSO_INLINE F even_bf16(B x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.hi, 16))};
}
DSO_INLINE F odd_bf16(B x) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(x.hi, high))};
}
DSO_INLINE __m256i pair_bf16_half(__m256 even, __m256 odd) {
  return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(even), 16),
                         _mm256_and_si256(_mm256_castps_si256(odd), _mm256_set1_epi32((int)0xffff0000)));
}
DSO_INLINE B pair_bf16(F even, F odd) { return {pair_bf16_half(even.lo, odd.lo), pair_bf16_half(even.hi, odd.hi)}; }

// The low (half 0) or high bytes of 32 words, E4M3 codes, as bf16, each divided by 256: exact, and never subnormal. NaN codes
// do not occur. Subnormals of E4M3 are rare in weights, and converted by a branch.
template <int half>
DSO_INLINE __m256i expand_e4m3_words(const void* p) {
  const __m256i codes = _mm256_loadu_si256((const __m256i*)p), code = half ? codes : _mm256_slli_epi16(codes, 8);
  // Sign, exponent and mantissa move to their positions; exponents 0..15 (bias 7) are combined with 112: as bf16's 112 + e they
  // represent e - 15.
  const __m256i x = _mm256_or_si256(_mm256_and_si256(_mm256_srai_epi16(code, 4), _mm256_set1_epi16((short)0x87f0)),
                                    _mm256_set1_epi16(0x3800));
  const __m256i subnormal = _mm256_cmpeq_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x7800)), _mm256_setzero_si256());
  if (__builtin_expect(_mm256_testz_si256(subnormal, subnormal), 1)) return x;
  const __m256i high = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0x37, 0x37, 0x37, 0x38, 0x38, 0x38, 0x38, 0, 0, 0, 0, 0, 0, 0, 0));  // m 2^-17
  const __m256i low =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, (char)0x80, (char)0xc0, 0, 0x20, 0x40, 0x60, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i mantissa = _mm256_and_si256(_mm256_srli_epi16(code, 8), _mm256_set1_epi16(7));
  __m256i value =
      _mm256_or_si256(_mm256_slli_epi16(_mm256_shuffle_epi8(high, mantissa), 8), _mm256_shuffle_epi8(low, mantissa));
  value = _mm256_or_si256(value, _mm256_and_si256(code, _mm256_set1_epi16((short)0x8000)));
  return _mm256_blendv_epi8(x, value, subnormal);
}
template <int half>
DSO_INLINE B expand_e4m3(const void* p) {
  return {expand_e4m3_words<half>(p), expand_e4m3_words<half>((const char*)p + 32)};
}

// Two rows of 32 16-bit elements to pairs per column: x holds columns 0-3, 8-11, 16-19 and 24-27, y the others. in_columns
// returns sums over such pairs to columns 0-15 and 16-31.
DSO_INLINE void pair_columns(B a, B b, B& x, B& y) {
  x = {_mm256_unpacklo_epi16(a.lo, b.lo), _mm256_unpacklo_epi16(a.hi, b.hi)};
  y = {_mm256_unpackhi_epi16(a.lo, b.lo), _mm256_unpackhi_epi16(a.hi, b.hi)};
}
DSO_INLINE void in_columns(F& x, F& y) {
  const F a = x, b = y;
  x = {_mm256_permute2f128_ps(a.lo, b.lo, 0x20), _mm256_permute2f128_ps(a.lo, b.lo, 0x31)};
  y = {_mm256_permute2f128_ps(a.hi, b.hi, 0x20), _mm256_permute2f128_ps(a.hi, b.hi, 0x31)};
}

DSO_INLINE void transpose_half(__m256i (&x)[8]) {  // 8 x 8
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i a = x[j], b = x[j + 4];
    x[j] = _mm256_permute2x128_si256(a, b, 0x20);
    x[j + 4] = _mm256_permute2x128_si256(a, b, 0x31);
  }
}
DSO_INLINE void transpose(B (&x)[16]) {  // 16 x 16 lanes
  __m256i quarter[4][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    quarter[0][i] = x[i].lo;
    quarter[1][i] = x[i + 8].lo;
    quarter[2][i] = x[i].hi;
    quarter[3][i] = x[i + 8].hi;
  }
  for (auto& q : quarter) transpose_half(q);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = {quarter[0][i], quarter[1][i]};
    x[i + 8] = {quarter[2][i], quarter[3][i]};
  }
}

constexpr bool has_dot_bf16 = false;  // dot_bf16 is no faster than two fmas
DSO_INLINE void round_bf16(void* p, F x) { store_bf16(p, x); }
DSO_INLINE __m256i round_pair_bf16_half(__m256 even, __m256 odd) {
  return _mm256_or_si256(bf16_bits(even), _mm256_slli_epi32(bf16_bits(odd), 16));
}
DSO_INLINE B round_pair_bf16(F even, F odd) {
  return {round_pair_bf16_half(even.lo, odd.lo), round_pair_bf16_half(even.hi, odd.hi)};
}

// Two bf16 columns per lane: acc + w0*a0 + w1*a1, by two fmas. Its rounding is specific to the variant.
DSO_INLINE __m256 dot_bf16_half(__m256 acc, __m256i w, __m256i a) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), acc);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(a, high)), acc);
}
DSO_INLINE F dot_bf16(F acc, B w, B a) { return {dot_bf16_half(acc.lo, w.lo, a.lo), dot_bf16_half(acc.hi, w.hi, a.hi)}; }
}  // namespace dso::DSO_ISA_NAMESPACE
#endif
