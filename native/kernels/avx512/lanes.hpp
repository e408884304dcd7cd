// The SIMD lane type on AVX-512 (F, BW, DQ, VL; VNNI and BF16 if the translation unit has them): 16 floats, 16 int32 or 64
// bytes at a time. avx2/lanes.hpp implements the same names over pairs of 256-bit registers, so that kernels/generic is written
// once. A lane is one output row of a matrix, or one element of a vector.
//
// Included inside a per-variant namespace (DSO_ISA_NAMESPACE), so everything here has internal linkage: no function compiled
// for AVX-512 may be shared with a translation unit of another ISA.
#ifndef DSO_AVX512_LANES_HPP  // not #pragma once: test_lanes includes it for several ISAs
#define DSO_AVX512_LANES_HPP
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace dso::DSO_ISA_NAMESPACE {
#define DSO_INLINE static inline __attribute__((always_inline))
#include "../x86/small_lanes.inl"

using F = __m512;   // 16 x f32
using I = __m512i;  // 16 x i32
using B = __m512i;  // 64 bytes: 16 lanes of 4
constexpr int lanes = 16;
constexpr int registers = 32;

DSO_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

// ---- float
DSO_INLINE F zero() { return _mm512_setzero_ps(); }
DSO_INLINE F set(float x) { return _mm512_set1_ps(x); }
DSO_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
DSO_INLINE F load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }  // the rest is zero
DSO_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
DSO_INLINE void store(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
DSO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
DSO_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
DSO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
DSO_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
DSO_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
DSO_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
DSO_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }              // b where either is NaN
DSO_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
DSO_INLINE F less(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}  // a < b ? x : y
DSO_INLINE F abs(F a) { return _mm512_abs_ps(a); }
DSO_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }  // half to even
DSO_INLINE F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n integral
// Fixed trees: the same order on every ISA. (i, i+8), (i, i+4), (i, i+2), (i, i+1).
DSO_INLINE float sum(F a) {
  __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
DSO_INLINE float largest(F a) {
  __m256 y = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

DSO_INLINE F keep(F a, int64_t lo, int64_t hi, F other) {  // lanes [lo, hi) of a, the others of `other`; any lo and hi
  const __mmask16 m = first(hi < 0 ? 0 : hi) & ~first(lo < 0 ? 0 : lo);
  return _mm512_mask_mov_ps(other, m, a);
}
// Lanes i and i + h, where bit h of i is not set, become their sum and difference.
template <int h>
DSO_INLINE F butterfly(F a) {
  const F other = h == 8   ? _mm512_shuffle_f32x4(a, a, 0x4e)
                  : h == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                  : h == 2 ? _mm512_permute_ps(a, 0x4e)
                           : _mm512_permute_ps(a, 0xb1);
  constexpr __mmask16 second = h == 8 ? 0xff00 : h == 4 ? 0xf0f0 : h == 2 ? 0xcccc : 0xaaaa;
  return _mm512_mask_sub_ps(_mm512_add_ps(a, other), second, other, a);
}
DSO_INLINE uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // bit i: a >= b in lane i
DSO_INLINE bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }

// ---- 16-bit floats in memory
DSO_INLINE F load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
DSO_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
DSO_INLINE F load_e5m3(const void* p) {  // 16 bytes: fp16 without the sign and the 7 last bits
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 7));
}
DSO_INLINE F load_e8(const void* p) {  // 16 bytes b: 2^(b - 128)
  const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  return _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(b, _mm512_set1_ps(128)));
}
DSO_INLINE __m512i bf16_bits(F x) {  // nearest even in the low halves, NaN as quiet NaN; denormals are preserved
  __m512i u = _mm512_castps_si512(x);
  __m512i r = _mm512_add_epi32(
      u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1))));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_srli_epi32(r, 16);
}
DSO_INLINE void store_bf16(void* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(x))); }

// ---- int32
DSO_INLINE I izero() { return _mm512_setzero_si512(); }
DSO_INLINE I iset(int32_t x) { return _mm512_set1_epi32(x); }
DSO_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
DSO_INLINE I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
template <int n>
DSO_INLINE I shl(I a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
DSO_INLINE I sar(I a) {
  return _mm512_srai_epi32(a, n);
}
DSO_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
DSO_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }                                                // half to even
DSO_INLINE I load_i8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }  // 16 signed bytes
DSO_INLINE I load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }  // 16 unsigned bytes
DSO_INLINE void store_i8(void* p, I a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}  // truncates: values already fit
DSO_INLINE int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }

// ---- bytes and dot products. A lane's 4 bytes are 4 consecutive columns; products are exact on every ISA.
DSO_INLINE B load_bytes(const void* p) { return _mm512_loadu_si512(p); }
DSO_INLINE void store_bytes(void* p, B x) { _mm512_storeu_si512(p, x); }
DSO_INLINE B broadcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Of each byte, bits [from, from + count) as bits [to, to + count); all others are 0.
// Constants, once loops are unrolled.
DSO_INLINE B move_bits(B x, int from, int to, int count) {
  if (from > to) x = _mm512_srli_epi16(x, from - to);
  if (from < to) x = _mm512_slli_epi16(x, to - from);
  return _mm512_and_si512(x, _mm512_set1_epi8((char)(((1 << count) - 1) << to)));
}
DSO_INLINE B xor_bits(B a, B b) { return _mm512_xor_si512(a, b); }
DSO_INLINE B select_bits(int mask, B a, B b) {  // of each byte, the bits of a where `mask` has ones, and of b elsewhere
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8((char)mask), a, b, 0xca);
}
template <int n>
DSO_INLINE B rotate(B x) {  // lanes, towards their upper bits
  return _mm512_rol_epi32(x, n);
}
DSO_INLINE B join_bits(B a, B b) { return _mm512_or_si512(a, b); }
DSO_INLINE B look_up(const uint8_t (&table)[16], B codes) {  // table[code] of each byte, code < 16
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), codes);
}
// table[low 4 bits] and table[high 4 bits] of each of 16 bytes.
DSO_INLINE void look_up_halves(const int8_t (&table)[16], const void* p, I& low, I& high) {
  const __m128i t = _mm_loadu_si128((const __m128i*)table), x = _mm_loadu_si128((const __m128i*)p), mask = _mm_set1_epi8(15);
  low = _mm512_cvtepi8_epi32(_mm_shuffle_epi8(t, _mm_and_si128(x, mask)));
  high = _mm512_cvtepi8_epi32(_mm_shuffle_epi8(t, _mm_and_si128(_mm_srli_epi16(x, 4), mask)));
}
// The same as two 16-bit elements per lane, the low one first. The table occurs twice.
DSO_INLINE B look_up_pairs(const uint16_t (&table)[32], const void* p) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm512_permutexvar_epi16(_mm512_or_si512(x, _mm512_slli_epi32(x, 12)), _mm512_loadu_si512(table));  // 5 bits count
}
DSO_INLINE I sum16_i8(const void* p) {  // the sum of 16 signed bytes, in every lane
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  __m128i s = _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), x), _mm_set1_epi16(1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm512_broadcastd_epi32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

constexpr int32_t dot_bias = 0;  // dot_u8 multiplies w - dot_bias
#ifdef __AVX512VNNI__
constexpr bool has_dot_int = true;
DSO_INLINE I dot_u7(I acc, B w, B a) { return _mm512_dpbusd_epi32(acc, w, a); }  // w: u8 <= 127, a: s8
DSO_INLINE I dot_u8(I acc, B w, B a) { return _mm512_dpbusd_epi32(acc, w, a); }  // w: any u8, a: s8
#else
constexpr bool has_dot_int = false;
DSO_INLINE I dot_u7(I acc, B w, B a) {  // pairs <= 2*127*128: maddubs cannot saturate
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, a), _mm512_set1_epi16(1)));
}
DSO_INLINE I dot_u8(I acc, B w, B a) {  // even and odd bytes as 16-bit integers: maddubs would saturate
  __m512i we = _mm512_and_si512(w, _mm512_set1_epi16(255)), wo = _mm512_srli_epi16(w, 8);
  __m512i ae = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), ao = _mm512_srai_epi16(a, 8);
  return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(we, ae), _mm512_madd_epi16(wo, ao)));
}
#endif
// The unsigned bytes of even and of odd columns as 16-bit words; and acc + the products of a lane's two words.
DSO_INLINE B even_words(B x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
DSO_INLINE B odd_words(B x) { return _mm512_srli_epi16(x, 8); }
DSO_INLINE I dot_words(I acc, B w, B a) { return _mm512_add_epi32(acc, _mm512_madd_epi16(w, a)); }
// x is computed here. GCC would otherwise compute all products first, for which there are not enough registers.
DSO_INLINE void compute_now(I& x) { __asm__("" : "+v"(x)); }

// Cheaper sums of dot_u7 without VNNI: 32 16-bit sums, which must not overflow (INT4: at most 8*2*15*128 = 30720 per group).
DSO_INLINE I pairs_u7(I acc, B w, B a) { return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, a)); }
DSO_INLINE I add_pairs(I acc) { return _mm512_madd_epi16(acc, _mm512_set1_epi16(1)); }

// A lane's two bf16 elements as floats, and back (the upper 16 bits: for values that are bf16 already).
DSO_INLINE F even_bf16(B x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
DSO_INLINE F odd_bf16(B x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000))); }
DSO_INLINE B pair_bf16(F even, F odd) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32((int)0xffff0000)));
}

// The low (half 0) or high bytes of 32 words, E4M3 codes, as bf16, each divided by 256: exact, and never subnormal. NaN codes
// do not occur. Subnormals of E4M3 are rare in weights, and converted by a branch.
template <int half>
DSO_INLINE B expand_e4m3(const void* p) {
  const __m512i codes = _mm512_loadu_si512(p), code = half ? codes : _mm512_slli_epi16(codes, 8);
  // Sign, exponent and mantissa move to their positions; exponents 0..15 (bias 7) are combined with 112: as bf16's 112 + e they
  // represent e - 15.
  __m512i x = _mm512_ternarylogic_epi32(_mm512_srai_epi16(code, 4), _mm512_set1_epi16((short)0x87f0), _mm512_set1_epi16(0x3800),
                                        0xea);  // a & b | c
  const __mmask32 subnormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x7800));
  if (__builtin_expect(subnormal != 0, 0)) {
    const __m512i values =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));  // m 2^-17
    const __m512i magnitude = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 8), values);
    x = _mm512_mask_mov_epi16(
        x, subnormal, _mm512_ternarylogic_epi32(code, _mm512_set1_epi16((short)0x8000), magnitude, 0xea));  // with the sign
  }
  return x;
}

// Two rows of 32 16-bit elements to pairs per column: x holds columns 0-3, 8-11, 16-19 and 24-27, y the others. in_columns
// returns sums over such pairs to columns 0-15 and 16-31.
DSO_INLINE void pair_columns(B a, B b, B& x, B& y) {
  x = _mm512_unpacklo_epi16(a, b);
  y = _mm512_unpackhi_epi16(a, b);
}
DSO_INLINE void in_columns(F& x, F& y) {
  const F a = x;
  x = _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), y);
  y = _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31), y);
}

DSO_INLINE void transpose(B (&x)[16]) {  // 16 x 16 lanes
  B t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // x[i + j]: columns 4k + j of rows i .. i + 3, for each k
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const B even = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), even8 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
    const B odd = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd), odd8 = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    x[j] = _mm512_shuffle_i32x4(even, even8, 0x88);
    x[j + 4] = _mm512_shuffle_i32x4(odd, odd8, 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(even, even8, 0xdd);
    x[j + 12] = _mm512_shuffle_i32x4(odd, odd8, 0xdd);
  }
}

// Two bf16 columns per lane: acc + w0*a0 + w1*a1. Its rounding is specific to the variant (a kernel family is fixed per
// variant).
#ifdef __AVX512BF16__
constexpr bool has_dot_bf16 = true;
DSO_INLINE void round_bf16(void* p, F x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
}  // as the dot product reads them: denormals are 0
DSO_INLINE B round_pair_bf16(F even, F odd) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
DSO_INLINE F dot_bf16(F acc, B w, B a) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a); }
#else
constexpr bool has_dot_bf16 = false;
DSO_INLINE void round_bf16(void* p, F x) { store_bf16(p, x); }
DSO_INLINE B round_pair_bf16(F even, F odd) { return _mm512_or_si512(bf16_bits(even), _mm512_slli_epi32(bf16_bits(odd), 16)); }
DSO_INLINE F dot_bf16(F acc, B w, B a) {
  const __m512i hi = _mm512_set1_epi32((int)0xffff0000);
  acc = fma(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), acc);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(w, hi)), _mm512_castsi512_ps(_mm512_and_si512(a, hi)), acc);
}
#endif
}  // namespace dso::DSO_ISA_NAMESPACE
#endif
