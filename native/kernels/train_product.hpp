// The interface between kernels and runtime for training: matrix products. As in kernels.hpp: plain types only, no std header
// with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dso {

struct ProductOperand {  // an operand: `lanes` (rows of C for the left operand, columns of C for the right one) by `depth`
  const uint8_t* data;
  int64_t ld;  // elements from one row to the next
  bool bf16;   // or fp32
  bool along;  // element (lane, k) is at lane * ld + k, otherwise at k * ld + lane
};

struct ProductResult {
  uint8_t* data;
  int64_t ld;
  bool bf16;
  bool add;             // to the previous content, in fp32, rounded once
  const uint8_t* bias;  // per column, or null
  bool bias_bf16;
};

struct ProductJob {  // C[M, N] = A B (+ bias) (+ C), summed over K in fp32
  int64_t M, N, K;
  ProductOperand a, b;
  ProductResult c;
};

struct TrainProduct {
  // Rows [m0, m1) and columns [n0, n1) of C; m0 is a multiple of 16 and n0 of product_columns. Elements are rounded to bf16
  // first unless `exact`. Every element of C is one chain of additions over ascending k, whatever the ranges. scratch:
  // 64-aligned, private to the thread, at least as many bytes as `scratch` returns for this number of rows and columns.
  void (*block)(const ProductJob& job, bool exact, int64_t m0, int64_t m1, int64_t n0, int64_t n1, uint8_t* scratch);
  int64_t (*scratch)(int64_t rows, int64_t columns, int64_t K);
  // sums[n] (+)= the sum of x[t, n] over t ascending, for columns [n0, n1). x is [T, ...], row-major; `along` is ignored.
  void (*column_sums)(const ProductOperand& x, int64_t T, int64_t n0, int64_t n1, uint8_t* sums, bool bf16, bool add);
};

constexpr int64_t product_rows = 32, product_columns = 96;  // computed at a time; blocks are multiples of these

}  // namespace dso
