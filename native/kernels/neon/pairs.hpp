// The order of panels for SMMLA, which multiplies two rows of 8 bytes by two rows of 8 bytes, twice the products of a dot
// product: vector 2 p + t of a quarter holds outputs 2 p and 2 p + 1 of tokens 2 t and 2 t + 1, the tokens of an output next to
// each other.
#pragma once
#include "panels.hpp"

#define DSO_OWN_PANELS Paired

namespace dso::DSO_ISA_NAMESPACE {
struct PairOrder {
  static constexpr int64_t numbers = 32;  // each twice

  // Of each pair of outputs, 4 times 8 columns.
  DSO_INLINE void store_codes(uint8_t* tile, const B (&quads)[8]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const B a = quads[2 * i], b = quads[2 * i + 1];
      const int32x4_t of_quarter[4][2] = {{a.q0, b.q0}, {a.q1, b.q1}, {a.q2, b.q2}, {a.q3, b.q3}};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        vst1q_u8(tile + 128 * q + 16 * i, as_u8(vzip1q_s32(of_quarter[q][0], of_quarter[q][1])));
        vst1q_u8(tile + 128 * q + 64 + 16 * i, as_u8(vzip2q_s32(of_quarter[q][0], of_quarter[q][1])));
      }
    }
  }
  DSO_INLINE void store_numbers(float* to, F x) {
    const float32x4_t quarters[4] = {x.q0, x.q1, x.q2, x.q3};
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      vst1q_f32(to + 8 * q, vzip1q_f32(quarters[q], quarters[q]));
      vst1q_f32(to + 8 * q + 4, vzip2q_f32(quarters[q], quarters[q]));
    }
  }

  struct Tokens {
    int8x16_t x[4][2];  // 8 columns of a pair of tokens
    inline __attribute__((always_inline)) Tokens(const uint8_t* codes, int64_t stride) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
          const int8_t* const at = (const int8_t*)codes + 2 * t * stride + 8 * i;
          x[i][t] = vcombine_s8(vld1_s8(at), vld1_s8(at + stride));
        }
    }
    template <int quad, int quads>
    inline __attribute__((always_inline)) void products(int32x4_t (&dot)[4], const uint8_t* codes) const {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const int8x16_t w = vld1q_s8((const int8_t*)codes + 64 * p + 8 * quad);
        dot[2 * p] = vmmlaq_s32(dot[2 * p], w, x[quad / 2][0]);
        dot[2 * p + 1] = vmmlaq_s32(dot[2 * p + 1], w, x[quad / 2][1]);
      }
      if constexpr (quads > 2) products<quad + 2, quads - 2>(dot, codes);
    }
  };

  DSO_INLINE float32x4_t of_outputs(const float* numbers, int quarter, int v) {
    return vld1q_f32(numbers + 8 * quarter + 4 * (v / 2));
  }
  DSO_INLINE float32x4_t of_tokens(const float (&x)[4], int v) {
    const float32x2_t pair = {x[v % 2 * 2], x[v % 2 * 2 + 1]};
    return vcombine_f32(pair, pair);
  }

  DSO_INLINE void load(float32x4_t (&sums)[4][4], const F (&rows)[4][1]) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      const F a = rows[2 * t][0], b = rows[2 * t + 1][0];
      const float32x4_t of_quarter[4][2] = {{a.q0, b.q0}, {a.q1, b.q1}, {a.q2, b.q2}, {a.q3, b.q3}};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        sums[q][t] = vzip1q_f32(of_quarter[q][0], of_quarter[q][1]);
        sums[q][2 + t] = vzip2q_f32(of_quarter[q][0], of_quarter[q][1]);
      }
    }
  }
  DSO_INLINE void store(const float32x4_t (&sums)[4][4], F (&rows)[4][1]) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
#define DSO_ROW(row, unzip)                                                                     \
  rows[2 * t + row][0] = {unzip(sums[0][t], sums[0][2 + t]), unzip(sums[1][t], sums[1][2 + t]), \
                          unzip(sums[2][t], sums[2][2 + t]), unzip(sums[3][t], sums[3][2 + t])}
      DSO_ROW(0, vuzp1q_f32);
      DSO_ROW(1, vuzp2q_f32);
#undef DSO_ROW
    }
  }
};

template <int format>
using Paired = Quartered<format, PairOrder>;
}  // namespace dso::DSO_ISA_NAMESPACE
