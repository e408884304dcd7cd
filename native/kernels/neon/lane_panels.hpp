// The order of panels for SDOT by an element: a vector holds 4 outputs of one token.
#pragma once
#include "panels.hpp"

#define DSO_OWN_PANELS ByElement

namespace dso::DSO_ISA_NAMESPACE {
struct ElementOrder {
  static constexpr int64_t numbers = 16;

  DSO_INLINE void store_codes(uint8_t* tile, const B (&quads)[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      vst1q_u8(tile + 16 * i, as_u8(quads[i].q0));
      vst1q_u8(tile + 128 + 16 * i, as_u8(quads[i].q1));
      vst1q_u8(tile + 256 + 16 * i, as_u8(quads[i].q2));
      vst1q_u8(tile + 384 + 16 * i, as_u8(quads[i].q3));
    }
  }
  DSO_INLINE void store_numbers(float* to, F x) { dso::DSO_ISA_NAMESPACE::store(to, x); }

  struct Tokens {
    int8x16_t x[4][2];
    inline __attribute__((always_inline)) Tokens(const uint8_t* codes, int64_t stride) {
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        x[m][0] = vld1q_s8((const int8_t*)codes + m * stride);
        x[m][1] = vld1q_s8((const int8_t*)codes + m * stride + 16);
      }
    }
    template <int quad, int quads>
    inline __attribute__((always_inline)) void products(int32x4_t (&dot)[4], const uint8_t* codes) const {
      const int8x16_t w = vld1q_s8((const int8_t*)codes + 16 * quad);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) dot[m] = vdotq_laneq_s32(dot[m], w, x[m][quad / 4], quad % 4);
      if constexpr (quads > 1) products<quad + 1, quads - 1>(dot, codes);
    }
  };

  DSO_INLINE float32x4_t of_outputs(const float* numbers, int quarter, int) { return vld1q_f32(numbers + 4 * quarter); }
  DSO_INLINE float32x4_t of_tokens(const float (&x)[4], int v) { return vdupq_n_f32(x[v]); }

  DSO_INLINE void load(float32x4_t (&sums)[4][4], const F (&rows)[4][1]) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      sums[0][m] = rows[m][0].q0;
      sums[1][m] = rows[m][0].q1;
      sums[2][m] = rows[m][0].q2;
      sums[3][m] = rows[m][0].q3;
    }
  }
  DSO_INLINE void store(const float32x4_t (&sums)[4][4], F (&rows)[4][1]) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) rows[m][0] = {sums[0][m], sums[1][m], sums[2][m], sums[3][m]};
  }
};

template <int format>
using ByElement = Quartered<format, ElementOrder>;
}  // namespace dso::DSO_ISA_NAMESPACE
