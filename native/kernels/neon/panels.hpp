// Panels of integer weights: unpacked once for all tokens, as signed bytes, so that no sum of activations corrects an offset.
// A group of 32 columns x 16 outputs is multiplied by 4 tokens in quarters of 4 outputs: 16 registers hold the floating-point
// sums of all quarters, 4 the dot products of one. Their order depends on the variant's instructions, and rows are formed only
// after the last group. Sums are exact and scales are applied as in generic/linear_int.hpp, so the results have the bits of the
// vector kernels.
#pragma once
#include "../generic/int_tiles.hpp"
#include "lane_dots.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// What an order defines:
//   numbers              floats that hold one number per output, as the products need them
//   store_codes          the codes of a group, 128 bytes for each quarter
//   store_numbers        one number per output
//   Tokens               32 columns of 4 tokens; products<quad, quads>(dot, codes of a quarter) adds dot products
//   of_outputs(p, q, v)  one number per output in the order of vector v of quarter q
//   of_tokens(x, v)      one number per token in the order of vector v
//   load, store          the sums from and to rows of 16 outputs

template <int format, class Order>
struct Quartered : Format<format> {
  using Base = Format<format>;
  using P = Packed<format>;
  static_assert(Base::largest - Base::offset < 128 &&
                (Base::offset <= 128 || Base::joins));                   // codes of -129 and below do not occur
  static constexpr int64_t numbers = 4 * Order::numbers * Base::halves;  // bytes
  static constexpr int64_t bytes = 512 + numbers * (Base::has_min ? 2 : 1);
  using Sums = float32x4_t[4][4];  // of quarter q, vector v

  DSO_INLINE void unpack(typename P::Place from, uint8_t* tile) {
    B quads[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      quads[i] = P::quad(from, i);
      if constexpr (Base::offset != 0) {
        const uint8x16_t offset = vdupq_n_u8((uint8_t)Base::offset);
#define DSO_EACH(q) from_u8(vsubq_u8(as_u8(quads[i].q), offset))
        quads[i] = DSO_QUARTERS(DSO_EACH);
#undef DSO_EACH
      }
    }
    Order::store_codes(tile, quads);
    unpack_numbers<0>(from, tile + 512);
    if constexpr (Base::halves == 2) unpack_numbers<1>(from, tile + 512 + 4 * Order::numbers);
  }
  template <int half>
  DSO_INLINE void unpack_numbers(typename P::Place from, uint8_t* to) {
    Order::store_numbers((float*)to, P::template scale<half>(from));
    if constexpr (Base::has_min) Order::store_numbers((float*)(to + numbers), P::template min<half>(from));
  }

  DSO_INLINE void load(Sums& sums, const F (&rows)[4][1]) { Order::load(sums, rows); }
  DSO_INLINE void store(const Sums& sums, F (&rows)[4][1]) { Order::store(sums, rows); }

  // Adds group g of the tokens x; the group's panel is `tile`.
  template <class Rows>
  DSO_INLINE void add(Sums& sums, const uint8_t* tile, const Rows& x, int64_t g) {
    const typename Order::Tokens high(x.codes(0) + 32 * g, x.stride);
    if constexpr (Rows::slot == DSO_SLOT_Q16) {
      const typename Order::Tokens low(x.codes(0) + x.width + 32 * g, x.stride);
      add_half<0>(sums, tile, x, g, high, &low);
      if constexpr (Base::halves == 2) add_half<1>(sums, tile, x, g, high, &low);
    } else {
      add_half<0>(sums, tile, x, g, high, nullptr);
      if constexpr (Base::halves == 2) add_half<1>(sums, tile, x, g, high, nullptr);
    }
  }
  // `low`: of Q16, whose high bytes are `high`.
  template <int half, class Rows, class Low>
  DSO_INLINE void add_half(Sums& sums, const uint8_t* tile, const Rows& x, int64_t g, const typename Order::Tokens& high,
                           Low low) {
    constexpr int quads = 8 / Base::halves;
    const uint8_t* at = tile;  // the quarter
    float token_scales[4], token_sums[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      token_scales[m] = x.scales(m)[g];
      if constexpr (Base::has_min && Base::halves == 1) token_sums[m] = (float)x.sums(m)[g];
      if constexpr (Base::has_min && Base::halves == 2) {
        const int32x4_t sums_of_half = Rows::template sum_of_half<half>(x, m, g).q0;  // clang's vgetq_lane_s32 is a macro
        token_sums[m] = (float)vgetq_lane_s32(sums_of_half, 0);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const float* const scale = (const float*)(at + 512 - 128 * q + 4 * Order::numbers * half);
      int32x4_t dot[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) dot[v] = vdupq_n_s32(0);
      high.template products<half * quads, quads>(dot, at);
      if constexpr (Rows::slot == DSO_SLOT_Q16) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) dot[v] = vshlq_n_s32(dot[v], 8);
        low->template products<half * quads, quads>(dot, at);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const float32x4_t a = Order::of_tokens(token_scales, v);
        sums[q][v] = vfmaq_f32(sums[q][v], vcvtq_f32_s32(dot[v]), vmulq_f32(Order::of_outputs(scale, q, v), a));
        if constexpr (Base::has_min) {
          const float32x4_t min = Order::of_outputs(scale + numbers / 4, q, v);
          sums[q][v] = vfmaq_f32(sums[q][v], vmulq_f32(min, a), Order::of_tokens(token_sums, v));
        }
      }
      at += 128;
      // Otherwise GCC begins all quarters at once, and runs out of registers.
      asm("" : "+r"(at), "+w"(sums[q][0]), "+w"(sums[q][1]), "+w"(sums[q][2]), "+w"(sums[q][3]));
    }
  }
};
}  // namespace dso::DSO_ISA_NAMESPACE
