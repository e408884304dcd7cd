// y = x W^T for integer weights (INT8, INT4, Q4_1) and integer activations (Q8, Q16). The same arithmetic for every token
// count, tile range and ISA: exact int32 dot products over groups of 32 columns, then, over ascending groups,
//   acc = fma(float(dot), scale_w * scale_a, acc);  Q4_1 also  acc = fma(min * scale_a, float(sum a), acc);
// and y = acc + bias.
//
// A few tile rows are multiplied by all tokens, 4 at a time, while the next tile rows are prefetched into L2. Packed tiles are
// read directly: unpacking uses ports that dot products leave free. Measured on Zen 5, panels of unpacked weights in L1, blocks
// of K and cache-sized blocks of tokens gained nothing at any token count from 8 to 512.
#pragma once
#include "int_tiles.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// ---- activations: rows of Q8 or Q16.
template <int kind>
struct Rows {
  const uint8_t* x;
  int64_t stride, width;  // bytes; columns padded to 32
  Rows from(int64_t t) const { return {x + t * stride, stride, width}; }
  const uint8_t* codes(int m) const { return x + m * stride; }
  const float* scales(int m) const { return (const float*)(codes(m) + scales_at<kind>(width)); }
  const int32_t* sums(int m) const { return (const int32_t*)(scales(m) + width / 32); }
};

// ---- the inner block: M tokens x N tile rows, `row_bytes` apart.
// acc += the exact dot products of one group.
template <class W, int M, int N>
DSO_INLINE void dots(I (&acc)[M][N], const uint8_t* w, int64_t row_bytes, const uint8_t* x, int64_t stride) {
  constexpr bool pairs = W::nibbles && !vnni;
  I sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = pairs ? izero() : acc[m][n];
#pragma GCC unroll 8
  for (int i = 0; i < 8 / W::quads; ++i) {
    B b[N][W::quads];
    for (int n = 0; n < N; ++n) W::read(w + n * row_bytes, i, b[n]);
    for (int k = 0; k < W::quads; ++k)
      for (int m = 0; m < M; ++m) {
        const B a = broadcast4(x + m * stride + 4 * (W::quads * i + k));
        for (int n = 0; n < N; ++n) {
          if constexpr (pairs)
            sum[m][n] = pairs_u4(sum[m][n], b[n][k], a);
          else if constexpr (W::nibbles)
            sum[m][n] = dot_u4(sum[m][n], b[n][k], a);
          else
            sum[m][n] = dot_u8(sum[m][n], b[n][k], a);
        }
      }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = pairs ? iadd(acc[m][n], add_pairs(sum[m][n])) : sum[m][n];
}

// Prefetching: the hardware's own prefetchers stop at every page.
// Stream: prefetches weights `distance` bytes ahead, for weights that only one block of tokens uses.
struct Stream {
  template <class W>
  inline __attribute__((always_inline)) void step(const uint8_t* w) {
    constexpr int64_t distance = 8192;
    for (int64_t i = 0; i < W::bytes; i += 64) __builtin_prefetch(w + distance + i);
  }
};
// Ahead: prefetches the next tile rows into L2, in equal portions while all blocks of tokens use the current ones.
struct Ahead {
  const uint8_t *at, *end;
  int64_t portion;  // bytes per group, a multiple of 64
  template <class W>
  inline __attribute__((always_inline)) void step(const uint8_t*) {
    if (at >= end) return;
    for (int64_t i = 0; i < portion; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += portion;
  }
};

// All groups of M tokens x N tile rows.
template <class W, int kind, int M, int N, class Fetch>
DSO_INLINE void accumulate(F (&acc)[M][N], const uint8_t* w, int64_t row_bytes, const Rows<kind>& x, Fetch& fetch) {
  for (int64_t g = 0; g < x.width / 32; ++g, w += W::bytes) {
    fetch.template step<W>(w);
    I start[M], dot[M][N];
    for (int m = 0; m < M; ++m) start[m] = iset(-W::offset * x.sums(m)[g]);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = kind == DSO_SLOT_Q16 ? izero() : start[m];
    dots<W>(dot, w, row_bytes, x.codes(0) + 32 * g, x.stride);
    if constexpr (kind == DSO_SLOT_Q16) {  // so far the high bytes
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) dot[m][n] = iadd(shl<8>(dot[m][n]), start[m]);
      dots<W>(dot, w, row_bytes, x.codes(0) + x.width + 32 * g, x.stride);
    }
    for (int n = 0; n < N; ++n) {
      const F scale = W::scale(w + n * row_bytes);
      for (int m = 0; m < M; ++m) {
        const F a = set(x.scales(m)[g]);
        acc[m][n] = fma(to_float(dot[m][n]), mul(scale, a), acc[m][n]);
        if constexpr (W::has_min) acc[m][n] = fma(mul(W::min(w + n * row_bytes), a), set((float)x.sums(m)[g]), acc[m][n]);
      }
    }
  }
}

// ---- outputs
struct Output {
  const float* bias;  // or null
  float* y;
  int64_t stride, rows;  // bytes; outputs past `rows` are not written
};

DSO_INLINE void finish(const Output& out, int64_t t, int64_t tile, F acc) {
  float* y = (float*)((uint8_t*)out.y + t * out.stride) + 16 * tile;
  const int64_t n = out.rows - 16 * tile;
  if (n >= 16) return store(y, out.bias ? add(acc, load(out.bias + 16 * tile)) : acc);
  store(y, out.bias ? add(acc, load(out.bias + 16 * tile, n)) : acc, n);
}

template <int format, int kind, int M, int N, class Fetch>
static void block(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t t, int64_t tile, Fetch& fetch) {
  const int64_t row_bytes = x.width / 32 * Packed<format>::bytes;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  accumulate<Packed<format>, kind, M, N>(acc, w.data + tile * row_bytes, row_bytes, x.from(t), fetch);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) finish(out, t + m, tile + n, acc[m][n]);
}

constexpr int block_rows = 4;  // tokens per block

template <int format, int kind, int N, class Fetch>
static void up_to_a_block(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t t, int64_t tokens, int64_t tile,
                          Fetch& fetch) {
  switch (tokens) {
    case 1:
      return block<format, kind, 1, N>(w, out, x, t, tile, fetch);
    case 2:
      return block<format, kind, 2, N>(w, out, x, t, tile, fetch);
    case 3:
      return block<format, kind, 3, N>(w, out, x, t, tile, fetch);
    default:
      return block<format, kind, block_rows, N>(w, out, x, t, tile, fetch);
  }
}

// N tile rows and all tokens, block after block: the tokens of a block share each weight, and the tile rows each activation.
template <int format, int kind, int N>
static void some_tiles(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t T, int64_t tile) {
  const int64_t groups = x.width / 32, row_bytes = groups * Packed<format>::bytes, blocks = (T + block_rows - 1) / block_rows;
  const uint8_t* next = w.data + (tile + N) * row_bytes;  // past the last tile row nothing is read, only prefetched
  Ahead fetch = {next, next + N * row_bytes, (N * Packed<format>::bytes / blocks + 63) / 64 * 64};
  for (int64_t t = 0; t < T; t += block_rows) up_to_a_block<format, kind, N>(w, out, x, t, T - t, tile, fetch);
}

template <int format, int kind>
static void linear_int(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t T, int64_t begin, int64_t end) {
  int64_t tile = begin;
  if (T <= block_rows) {  // limited by memory, which is fastest with a single stream
    Stream fetch;
    for (; tile < end; ++tile) up_to_a_block<format, kind, 1>(w, out, x, 0, T, tile, fetch);
    return;
  }
  constexpr int N =
      registers >= 32 && vnni ? 3 : 1;  // 4 x 3 int32 and 4 x 3 float accumulators; without VNNI, dot products need registers
  for (; tile + N <= end; tile += N) some_tiles<format, kind, N>(w, out, x, T, tile);
  for (; tile < end; ++tile) some_tiles<format, kind, 1>(w, out, x, T, tile);
}

template <int kind>
static void linear_int(const Matrix& w, const float* bias, const uint8_t* x, int64_t x_stride, int64_t T, int64_t begin,
                       int64_t end, float* y, int64_t y_stride) {
  const Output out = {bias, y, y_stride, w.rows};
  const Rows<kind> rows = {x, x_stride, padded(w.cols)};
  switch (w.format) {
    case DSO_INT8:
      return linear_int<DSO_INT8, kind>(w, out, rows, T, begin, end);
    case DSO_INT4:
      return linear_int<DSO_INT4, kind>(w, out, rows, T, begin, end);
    case DSO_Q4_1:
      return linear_int<DSO_Q4_1, kind>(w, out, rows, T, begin, end);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
