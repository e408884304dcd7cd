// Dot products by an element: SDOT and USDOT multiply by 4 bytes of a register that holds 16 columns of a token, so that no
// register is filled with copies of them. Sums are exact: the same bits as with the lanes' dot_u7 and dot_u8.
#pragma once
#include <cstdint>

namespace dso::DSO_ISA_NAMESPACE {

template <bool any_byte, int quad>
DSO_INLINE int32x4_t lane_dot(int32x4_t acc, int32x4_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_laneq_s32(acc, as_u8(w), x, quad);
#else
  if constexpr (any_byte) w = from_u8(veorq_u8(as_u8(w), vdupq_n_u8(dot_bias)));
  return vdotq_laneq_s32(acc, as_s8(w), x, quad);
#endif
}

// Quad number 4 * four + quad of a group, and the rest of its four.
template <class W, int four, int quad, int M, int N>
DSO_INLINE void four_dots(I (&acc)[M][N], typename W::Place w, int64_t row_bytes, const int8x16_t (&x)[M]) {
  constexpr bool any_byte = W::largest > 127;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const B b = W::quad(w.rows_below(n * row_bytes), 4 * four + quad);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      I& a = acc[m][n];
      a = {lane_dot<any_byte, quad>(a.q0, b.q0, x[m]), lane_dot<any_byte, quad>(a.q1, b.q1, x[m]),
           lane_dot<any_byte, quad>(a.q2, b.q2, x[m]), lane_dot<any_byte, quad>(a.q3, b.q3, x[m])};
    }
  }
  if constexpr (quad < 3) four_dots<W, four, quad + 1>(acc, w, row_bytes, x);
}

// The same as dots() of generic/linear_int.hpp, which this replaces because it is constrained.
template <class W, int first, int quads, int M, int N, class Place>
  requires has_dot_int
DSO_INLINE void dots(I (&acc)[M][N], Place w, int64_t row_bytes, const uint8_t* x, int64_t stride) {
  static_assert(first % 4 == 0 && (quads == 4 || quads == 8));
  int8x16_t tokens[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) tokens[m] = vld1q_s8((const int8_t*)x + m * stride + 4 * first);
  four_dots<W, first / 4, 0>(acc, w, row_bytes, tokens);
  if constexpr (quads == 8) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) tokens[m] = vld1q_s8((const int8_t*)x + m * stride + 4 * first + 16);
    four_dots<W, first / 4 + 1, 0>(acc, w, row_bytes, tokens);
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
