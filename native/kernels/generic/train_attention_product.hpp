// The products of attention in training: c[rows][cols] (+)= a[rows][depth] b[depth][cols].
//
// Operands are words of 4 bytes: an fp32 element, or a pair of bf16 elements that are adjacent along the depth. A word of `a`
// is broadcast; 16 columns of `b` are read at once. Each output is one chain of additions along the depth, whatever the
// blocking.
#pragma once
#include "../train_attention.hpp"
#include "dso_train.h"
#include "math.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

using Word = uint32_t;

struct Operand {
  const Word* words;
  int64_t stride;  // words from one row to the next
};
struct Result {
  float* data;
  int64_t stride;
  bool add;  // to the previous content
};

template <bool pairs, int R, int C>
DSO_INLINE void product_tile(Operand a, Operand b, int64_t depth, Result c) {
  F acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < C; ++n) acc[r][n] = c.add ? load(c.data + r * c.stride + 16 * n) : zero();
  const Word *x = a.words, *w = b.words;
  for (int64_t k = 0; k < depth; ++k, ++x, w += b.stride) {
    if constexpr (pairs) {
      B column[C];
#pragma GCC unroll 2
      for (int n = 0; n < C; ++n) column[n] = load_bytes(w + 16 * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const B row = broadcast4(x + r * a.stride);
#pragma GCC unroll 2
        for (int n = 0; n < C; ++n) acc[r][n] = dot_bf16(acc[r][n], column[n], row);
      }
    } else {
      F column[C];
#pragma GCC unroll 2
      for (int n = 0; n < C; ++n) column[n] = load((const float*)w + 16 * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = set(((const float*)x)[r * a.stride]);
#pragma GCC unroll 2
        for (int n = 0; n < C; ++n) acc[r][n] = fma(row, column[n], acc[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < C; ++n) store(c.data + r * c.stride + 16 * n, acc[r][n]);
}

template <bool pairs, int C>
static void product_columns(Operand a, int64_t rows, Operand b, int64_t depth, Result c) {
  constexpr int R = registers >= 32 ? 8 : 4;
  for (int64_t r = 0; r < rows; r += R)
    product_tile<pairs, R, C>({a.words + r * a.stride, a.stride}, b, depth, {c.data + r * c.stride, c.stride, c.add});
}

template <bool of_pairs>
struct VectorProduct {
  static constexpr bool pairs = of_pairs;
  static constexpr int64_t step = 16;                   // rows and columns are multiples of it
  static constexpr int64_t depth_step = pairs ? 2 : 1;  // so is the depth, in elements

  void operator()(Operand a, int64_t rows, Operand b, int64_t cols, int64_t depth, Result c) {
    constexpr int C = registers >= 32 ? 2 : 1;
    int64_t n = 0;
    for (; n + 16 * C <= cols; n += 16 * C)
      product_columns<pairs, C>(a, rows, {b.words + n, b.stride}, depth, {c.data + n, c.stride, c.add});
    if (n < cols) product_columns<pairs, 1>(a, rows, {b.words + n, b.stride}, depth, {c.data + n, c.stride, c.add});
  }
};

#ifdef DSO_TILES
// The same on tile registers: blocks of 32 rows and 32 columns, with 32 elements of the depth at a time.
struct TileProduct {
  static constexpr bool pairs = true;
  static constexpr int64_t step = 32, depth_step = 32;

  TileProduct() : tiles(64) { tiles.shape(16, 16); }

  void operator()(Operand a, int64_t rows, Operand b, int64_t cols, int64_t depth, Result c) {
    for (int64_t n = 0; n < cols; n += 32)
      for (int64_t r = 0; r < rows; r += 32)
        block(a.words + r * a.stride, 4 * a.stride, b.words + n, 4 * b.stride, depth, c.data + r * c.stride + n, c.stride,
              c.add);
  }

 private:
  void block(const Word* a, int64_t a_bytes, const Word* b, int64_t b_bytes, int64_t depth, float* c, int64_t stride,
             bool add) {
    float* const lower = c + 16 * stride;
    if (add) {
      tiles.load<0>(c, 4 * stride), tiles.load<1>(c + 16, 4 * stride);
      tiles.load<2>(lower, 4 * stride), tiles.load<3>(lower + 16, 4 * stride);
    } else {
      tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
    }
    for (int64_t k = 0; k < depth; k += 16, a += 16, b += 4 * b_bytes) {
      tiles.load<4>(a, a_bytes), tiles.load<5>((const char*)a + 16 * a_bytes, a_bytes);
      tiles.load<6>(b, b_bytes), tiles.load<7>(b + 16, b_bytes);
      tiles.dot_bf16<0, 4, 6>(), tiles.dot_bf16<1, 4, 7>(), tiles.dot_bf16<2, 5, 6>(), tiles.dot_bf16<3, 5, 7>();
    }
    tiles.store<0>(c, 4 * stride), tiles.store<1>(c + 16, 4 * stride);
    tiles.store<2>(lower, 4 * stride), tiles.store<3>(lower + 16, 4 * stride);
  }

  Tiles tiles;
};
using NarrowProduct = TileProduct;
#else
using NarrowProduct = VectorProduct<has_dot_bf16>;  // without a bf16 instruction, products are in fp32
#endif
using WideProduct = VectorProduct<false>;
}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
