// Panels of integer weights for USMMLA, which multiplies two rows of 8 unsigned bytes by two rows of 8 signed ones: pairs of
// outputs by pairs of tokens, twice the products of a dot product. Weights are unpacked once for all tokens. Sums are exact, so
// the results have the bits of the vector kernels.
#pragma once
#include "../generic/int_tiles.hpp"
#include "lane_dots.hpp"

#define DSO_OWN_PANELS Paired

namespace dso::DSO_ISA_NAMESPACE {

// A group: for each 8 columns, 8 pairs of rows of 16 bytes; then the scales, and the minimums, of each half.
template <int format>
struct Paired : Format<format> {
  using Base = Format<format>;
  using P = Packed<format>;
  static constexpr bool pairs = true;
  static constexpr int32_t dot_bias = 0;                 // unlike the products of the packed form, these take any unsigned code
  static constexpr int64_t numbers = 64 * Base::halves;  // bytes
  static constexpr int64_t bytes = 512 + numbers * (Base::has_min ? 2 : 1);
  struct Place {
    const uint8_t* group;
    Place rows_below(int64_t bytes) const { return {group + bytes}; }
  };
  DSO_INLINE Place place(const uint8_t* tiles, int64_t g) { return {tiles + g * bytes}; }
  template <int half>
  DSO_INLINE F scale(Place at) {
    return load((const float*)(at.group + 512 + 64 * half));
  }
  template <int half>
  DSO_INLINE F min(Place at) {
    return load((const float*)(at.group + 512 + numbers + 64 * half));
  }

  template <int half>
  DSO_INLINE void unpack_numbers(typename P::Place from, uint8_t* tile) {
    store((float*)(tile + 512 + 64 * half), P::template scale<half>(from));
    if constexpr (Base::has_min) store((float*)(tile + 512 + numbers + 64 * half), P::template min<half>(from));
  }
  DSO_INLINE void unpack(typename P::Place from, uint8_t* tile) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const B a = P::quad(from.group, 2 * i), b = P::quad(from.group, 2 * i + 1);
      store_bytes(tile + 128 * i,
                  {vzip1q_s32(a.q0, b.q0), vzip2q_s32(a.q0, b.q0), vzip1q_s32(a.q1, b.q1), vzip2q_s32(a.q1, b.q1)});
      store_bytes(tile + 128 * i + 64,
                  {vzip1q_s32(a.q2, b.q2), vzip2q_s32(a.q2, b.q2), vzip1q_s32(a.q3, b.q3), vzip2q_s32(a.q3, b.q3)});
    }
    unpack_numbers<0>(from, tile);
    if constexpr (Base::halves == 2) unpack_numbers<1>(from, tile);
  }
};

// The same as dots() of packed weights, for 4 tokens and one tile row.
template <class W, int first, int quads, int M, int N>
  requires InPairs<W>
DSO_INLINE void dots(I (&acc)[M][N], const uint8_t* w, int64_t, const uint8_t* x, int64_t stride) {
  static_assert(M == 4 && N == 1 && first % 2 == 0 && quads % 2 == 0);
  int32x4_t sum[8][2];  // [pair of rows][pair of tokens]: r0 t0, r0 t1, r1 t0, r1 t1
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) sum[p][0] = sum[p][1] = vdupq_n_s32(0);
#pragma GCC unroll 4
  for (int i = first / 2; i < (first + quads) / 2; ++i) {
    int8x16_t tokens[2];
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const int8_t* const at = (const int8_t*)x + 2 * t * stride + 8 * i;
      tokens[t] = vcombine_s8(vld1_s8(at), vld1_s8(at + stride));
    }
#pragma GCC unroll 8
    for (int p = 0; p < 8; ++p) {
      const uint8x16_t rows = vld1q_u8(w + 128 * i + 16 * p);
      sum[p][0] = vusmmlaq_s32(sum[p][0], rows, tokens[0]);
      sum[p][1] = vusmmlaq_s32(sum[p][1], rows, tokens[1]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    acc[2 * t][0] = iadd(acc[2 * t][0], {vuzp1q_s32(sum[0][t], sum[1][t]), vuzp1q_s32(sum[2][t], sum[3][t]),
                                         vuzp1q_s32(sum[4][t], sum[5][t]), vuzp1q_s32(sum[6][t], sum[7][t])});
    acc[2 * t + 1][0] = iadd(acc[2 * t + 1][0], {vuzp2q_s32(sum[0][t], sum[1][t]), vuzp2q_s32(sum[2][t], sum[3][t]),
                                                 vuzp2q_s32(sum[4][t], sum[5][t]), vuzp2q_s32(sum[6][t], sum[7][t])});
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
