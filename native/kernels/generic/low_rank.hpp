// Products with the matrices of adapters: y = x W^T, or y += x W^T, with W in fp32 or bf16, rows x of F32 or BF16, y in fp32.
//
// Each output is the sum of two chains, whatever the number of rows: the same bits in every batch. The chains are fused
// multiply-adds over the even and the odd columns, in ascending order: the same bits on every ISA. Only where both W and x are
// bf16 and the ISA has a product of bf16 pairs, they are dot_bf16 over the even and the odd pairs of columns. A lane is an
// output.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {
namespace low_rank {

constexpr int max_rows = registers >= 32 ? 12 : 2;  // per block: each has two accumulators

struct Input {
  const uint8_t* x;
  int64_t stride;  // bytes
  const uint8_t* row(int64_t i) const { return x + i * stride; }
};

struct Output {
  float* y;  // at the first output of the matrix
  int64_t stride;
  bool accumulate;
  float* row(int64_t i) const { return (float*)((uint8_t*)y + i * stride); }
};

// Fetches `bytes` of what lies `ahead` of w.
DSO_INLINE void fetch(const uint8_t* w, int64_t ahead, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + ahead + i, 0, 2);
}

// A row's elements in columns k and k + 1; only the first, if k is the last column. k is even.
template <int kind>
DSO_INLINE F first_element(const uint8_t* x, int64_t k) {
  return kind == DSO_SLOT_F32 ? set(((const float*)x)[k]) : even_bf16(broadcast4(x + 2 * k));
}
template <int kind>
DSO_INLINE F second_element(const uint8_t* x, int64_t k) {
  return kind == DSO_SLOT_F32 ? set(((const float*)x)[k + 1]) : odd_bf16(broadcast4(x + 2 * k));
}

template <int format, int kind, int M>
DSO_INLINE void columns(const uint8_t* w, int64_t ahead, int64_t cols, const Input& x, F (&even)[M], F (&odd)[M]) {
  constexpr int64_t step = (format == DSO_F32 ? 8 : 4) * lanes;
  for (int64_t k = 0; k < cols; k += 2, w += step) {
    fetch(w, ahead, step);
    const F first = format == DSO_F32 ? load((const float*)w) : even_bf16(load_bytes(w));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) even[m] = fma(first, first_element<kind>(x.row(m), k), even[m]);
    if (k + 1 == cols) break;
    const F second = format == DSO_F32 ? load((const float*)w + lanes) : odd_bf16(load_bytes(w));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) odd[m] = fma(second, second_element<kind>(x.row(m), k), odd[m]);
  }
}

// The elements after an odd number of columns are zero.
template <int M>
DSO_INLINE void pairs(const uint8_t* w, int64_t ahead, int64_t cols, const Input& x, F (&even)[M], F (&odd)[M]) {
  for (int64_t k = 0; k < cols; k += 4, w += 128) {
    fetch(w, ahead, 128);
    const B first = load_bytes(w);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) even[m] = dot_bf16(even[m], first, broadcast4(x.row(m) + 2 * k));
    if (k + 2 >= cols) break;
    const B second = load_bytes(w + 64);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) odd[m] = dot_bf16(odd[m], second, broadcast4(x.row(m) + 2 * k + 4));
  }
}

// M rows times tiles [tile, tile_end). ahead: bytes from each weight to one that is fetched meanwhile.
template <int format, int kind, int M>
static void block(const LowRank& w, int64_t ahead, const Input& x, int64_t tile, int64_t tile_end, const Output& out) {
  for (; tile < tile_end; ++tile) {
    const uint8_t* weights = w.data + tile * w.tile_bytes;
    F even[M], odd[M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) even[m] = odd[m] = zero();
    if constexpr (format == DSO_BF16 && kind == DSO_SLOT_BF16 && has_dot_bf16)
      pairs(weights, ahead, w.cols, x, even, odd);
    else
      columns<format, kind>(weights, ahead, w.cols, x, even, odd);
    const int64_t n = w.rows - tile * lanes;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      float* y = out.row(m) + tile * lanes;
      F sum = add(even[m], odd[m]);
      if (out.accumulate) sum = add(n >= lanes ? load(y) : load(y, n), sum);
      store_some(y, sum, n);
    }
  }
}

// Passes the number of rows, 1 to max_rows, as a constant.
template <int format, int kind, int M = max_rows>
static void rows(int count, const LowRank& w, int64_t ahead, const Input& x, int64_t tile, int64_t tile_end,
                 const Output& out) {
  if constexpr (M > 1)
    if (count < M) return rows<format, kind, M - 1>(count, w, ahead, x, tile, tile_end, out);
  block<format, kind, M>(w, ahead, x, tile, tile_end, out);
}

template <int format, int kind>
static void run(const LowRank& w, const Input& x, int64_t T, int64_t tile, int64_t tile_end, const Output& out) {
  const int64_t blocks = (T + max_rows - 1) / max_rows, ahead = w.next ? w.next - w.data : 0;
  for (int64_t b = 0, t = 0; b < blocks; ++b) {  // of even size
    const int M = (int)((b + 1) * T / blocks - t);
    rows<format, kind>(M, w, b == 0 ? ahead : 0, {x.row(t), x.stride}, tile, tile_end,
                       {out.row(t), out.stride, out.accumulate});
    t += M;
  }
}

template <int format>
static void run(const LowRank& w, int32_t kind, const Input& x, int64_t T, int64_t tile, int64_t tile_end, const Output& out) {
  if (kind == DSO_SLOT_F32)
    run<format, DSO_SLOT_F32>(w, x, T, tile, tile_end, out);
  else
    run<format, DSO_SLOT_BF16>(w, x, T, tile, tile_end, out);
}

}  // namespace low_rank

static void low_rank_product(const LowRank& w, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T, int64_t tile_begin,
                             int64_t tile_end, bool accumulate, float* y, int64_t y_stride) {
  if (w.format == DSO_F32)
    low_rank::run<DSO_F32>(w, kind, {x, x_stride}, T, tile_begin, tile_end, {y, y_stride, accumulate});
  else
    low_rank::run<DSO_BF16>(w, kind, {x, x_stride}, T, tile_begin, tile_end, {y, y_stride, accumulate});
}

}  // namespace dso::DSO_ISA_NAMESPACE
