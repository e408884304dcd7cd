// Products with the matrices of adapters: y = x W^T, or y += x W^T, with x and y in fp32 and W in fp32 or bf16.
//
// Each output is the sum of two chains of fused multiply-adds, over its even and its odd columns in ascending order, whatever
// the number of rows: the same bits on every ISA and in every batch. A lane is an output.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {
namespace low_rank {

constexpr int max_rows = registers >= 32 ? 12 : 2;  // per block: each has two accumulators

DSO_INLINE const float* row(const float* p, int64_t stride, int64_t i) { return (const float*)((const char*)p + i * stride); }

// The weights of two columns.
template <int format>
DSO_INLINE void weights(const uint8_t* w, F& first, F& second) {
  if constexpr (format == DSO_F32) {
    first = load((const float*)w);
    second = load((const float*)w + lanes);
  } else {
    const B both = load_bytes(w);
    first = even_bf16(both);
    second = odd_bf16(both);
  }
}

// M rows times one tile, of whose outputs n exist. ahead: bytes from each weight to one that is fetched meanwhile.
template <int format, int M>
static void block(const uint8_t* w, int64_t ahead, int64_t cols, const float* x, int64_t x_stride, int64_t n, bool accumulate,
                  float* y, int64_t y_stride) {
  constexpr int64_t step = (format == DSO_F32 ? 8 : 4) * lanes;
  F even[M], odd[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) even[m] = odd[m] = zero();
  int64_t k = 0;
  for (; k + 2 <= cols; k += 2, w += step) {
    for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(w + ahead + i, 0, 2);
    F first, second;
    weights<format>(w, first, second);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const float* values = row(x, x_stride, m) + k;
      even[m] = fma(first, set(values[0]), even[m]);
      odd[m] = fma(second, set(values[1]), odd[m]);
    }
  }
  if (k < cols) {
    const F first = format == DSO_F32 ? load((const float*)w) : even_bf16(load_bytes(w));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) even[m] = fma(first, set(row(x, x_stride, m)[k]), even[m]);
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float* out = (float*)row(y, y_stride, m);
    F sum = add(even[m], odd[m]);
    if (accumulate) sum = add(n >= lanes ? load(out) : load(out, n), sum);
    store_some(out, sum, n);
  }
}

// Passes the number of rows, 1 to max_rows, as a constant.
template <int format, int M = max_rows>
static void rows(int count, const uint8_t* w, int64_t ahead, int64_t cols, const float* x, int64_t x_stride, int64_t n,
                 bool accumulate, float* y, int64_t y_stride) {
  if constexpr (M > 1)
    if (count < M) return rows<format, M - 1>(count, w, ahead, cols, x, x_stride, n, accumulate, y, y_stride);
  block<format, M>(w, ahead, cols, x, x_stride, n, accumulate, y, y_stride);
}

template <int format>
static void run(const LowRank& w, const float* x, int64_t x_stride, int64_t T, int64_t tile_begin, int64_t tile_end,
                bool accumulate, float* y, int64_t y_stride) {
  const int64_t blocks = (T + max_rows - 1) / max_rows, ahead = w.next ? w.next - w.data : 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint8_t* weights = w.data + tile * w.tile_bytes;
    for (int64_t b = 0, t = 0; b < blocks; ++b) {  // of even size
      const int M = (int)((b + 1) * T / blocks - t);
      rows<format>(M, weights, b == 0 ? ahead : 0, w.cols, row(x, x_stride, t), x_stride, w.rows - tile * lanes, accumulate,
                   (float*)row(y, y_stride, t) + tile * lanes, y_stride);
      t += M;
    }
  }
}

}  // namespace low_rank

static void low_rank_product(const LowRank& w, const float* x, int64_t x_stride, int64_t T, int64_t tile_begin,
                             int64_t tile_end, bool accumulate, float* y, int64_t y_stride) {
  if (w.format == DSO_F32)
    low_rank::run<DSO_F32>(w, x, x_stride, T, tile_begin, tile_end, accumulate, y, y_stride);
  else
    low_rank::run<DSO_BF16>(w, x, x_stride, T, tile_begin, tile_end, accumulate, y, y_stride);
}

}  // namespace dso::DSO_ISA_NAMESPACE
