// y = x W^T + bias for FP8 weights (E4M3, one scale per 128 x 128 block) with BF16 rows.
//
// The same arithmetic per variant for any T, tile range and phase: codes are converted to bf16 exactly; each output sums the
// pairs of 128 columns in ONE chain of dot_bf16, ascending from zero; then acc = fma(sum, scale, acc), blocks ascending; the
// bias is added last. So a row's bits are the same whether codes are expanded while streaming (few rows: limited by memory) or
// once into a panel in L1 for all rows.
//
// expand_e4m3 gives value / 256, so that every code, including subnormals of E4M3, is a normal bf16 built with a single OR
// (dot_bf16 treats subnormal bf16 as zero). The scale compensates.
#pragma once
#include "linear_float.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace fp8 {

using floating::read;
using floating::tiles_for;

constexpr int64_t tile_bytes = 544, scale_at = 512;
constexpr int tile_steps = 16;   // each step has two columns; four columns share 64 bytes of codes
constexpr int block_tiles = 4;   // tiles of 32 columns that share a scale
constexpr int64_t ahead = 8192;  // bytes prefetched ahead of streamed weights, for all tile rows together
constexpr int max_tokens = floating::max_tokens<DSO_BF16>;
constexpr int panel_rows = tiles_for(max_tokens);

struct Codes {  // packed tile rows, from one block of columns on
  const uint8_t* at;
  int64_t next;  // bytes from one tile row to the next
  template <int N, int half>
  DSO_INLINE B step(const Codes& w, int n, int tile, int four) {
    const uint8_t* codes = w.at + n * w.next + tile * tile_bytes + 64 * four;
    if constexpr (half == 0) __builtin_prefetch(codes + ahead / N);
    return expand_e4m3<half>(codes);
  }
};

struct Panel {  // the same, expanded: [tile][step][N][64 bytes]
  const uint8_t* at;
  template <int N, int half>
  DSO_INLINE B step(const Panel& w, int n, int tile, int four) {
    return load_bytes(w.at + ((tile * tile_steps + 2 * four + half) * N + n) * 64);
  }
};

// M tokens x N tile rows over one block of columns (`tiles` tiles), added to y.
struct Output {
  float* y;                 // first token, first tile row
  int64_t stride, columns;  // bytes; outputs that exist from there on, at least one
  const float* bias;        // for the first tile row; null if there is none, or further blocks of columns follow
  bool first;               // whether this is the first block of columns
};

// The products of two columns.
template <class W, int M, int N, int half>
DSO_INLINE void step(const W& w, int tile, int four, const uint8_t* x, int64_t x_stride, F (&sum)[M][N]) {
  B weight[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) weight[n] = W::template step<N, half>(w, n, tile, four);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    const B a = broadcast4(x + m * x_stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[m][n] = dot_bf16(sum[m][n], weight[n], a);
  }
}

template <class W, int M, int N>
static void block(const W& w, const float* scales, const uint8_t* x, int64_t x_stride, int tiles, const Output& out) {
  F sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) sum[m][n] = zero();
  }
  for (int tile = 0; tile < tiles; tile++) {
    for (int four = 0; four < tile_steps / 2; four++, x += 8) {
      step<W, M, N, 0>(w, tile, four, x, x_stride, sum);
      step<W, M, N, 1>(w, tile, four, x + 4, x_stride, sum);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    const int64_t columns = out.columns - n * lanes;
    const F scale = set(scales[n]), bias = out.bias ? read(out.bias + n * lanes, columns) : zero();
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      float* y = (float*)((uint8_t*)out.y + m * out.stride) + n * lanes;
      const F acc = fma(sum[m][n], scale, out.first ? zero() : read(y, columns));
      store_some(y, out.bias ? add(acc, bias) : acc, columns);
    }
  }
}

template <class W, int N>
static void rows(int M, const W& w, const float* scales, const uint8_t* x, int64_t x_stride, int tiles, const Output& out) {
  switch (M) {
    case 1:
      return block<W, 1, N>(w, scales, x, x_stride, tiles, out);
    case 2:
      return block<W, 2, N>(w, scales, x, x_stride, tiles, out);
    case 3:
      return block<W, 3, N>(w, scales, x, x_stride, tiles, out);
    case 4:
      return block<W, 4, N>(w, scales, x, x_stride, tiles, out);
    case 5:
      return block<W, 5, N>(w, scales, x, x_stride, tiles, out);
    default:
      return block<W, 6, N>(w, scales, x, x_stride, tiles, out);
  }
}

struct Job {
  const Matrix& w;
  const float* bias;
  const uint8_t* x;
  int64_t x_stride, T;
  float* y;
  int64_t y_stride;
  uint8_t* scratch;
};

// The factor of the sums of a block, by one of its tiles: codes are expanded to 1 / 256 of their values.
static inline float scale_of(const uint8_t* tile) {
  float scale;
  memcpy(&scale, tile + scale_at, 4);
  return 256 * scale;
}

// N tile rows times all rows of x, one block of columns after the other.
template <int N>
static void tile_rows(const Job& j, int64_t tile) {
  const int64_t all = (j.w.cols + 31) / 32, next = all * tile_bytes;
  const int64_t blocks = (j.T + max_tokens - 1) / max_tokens;
  for (int64_t g = 0; g < all; g += block_tiles) {
    const int tiles = (int)(all - g < block_tiles ? all - g : block_tiles);
    const Codes codes = {j.w.data + tile * next + g * tile_bytes, next};
    float scales[N];
    for (int n = 0; n < N; n++) scales[n] = scale_of(codes.at + n * next);
    if (blocks > 1) {
      uint8_t* to = j.scratch;
      for (int t = 0; t < tiles; t++) {
        for (int four = 0; four < tile_steps / 2; four++, to += 2 * N * 64)
          for (int n = 0; n < N; n++) {
            store_bytes(to + n * 64, Codes::step<N, 0>(codes, n, t, four));
            store_bytes(to + (N + n) * 64, Codes::step<N, 1>(codes, n, t, four));
          }
      }
    }
    const bool last = g + block_tiles >= all;
    for (int64_t b = 0, t = 0; b < blocks; b++) {  // blocks of even size, so that none has a single row
      const int M = (int)((b + 1) * j.T / blocks - t);
      const uint8_t* x = j.x + t * j.x_stride + 64 * g;
      const Output out = {(float*)((uint8_t*)j.y + t * j.y_stride) + tile * lanes, j.y_stride, j.w.rows - tile * lanes,
                          last && j.bias ? j.bias + tile * lanes : nullptr, g == 0};
      if (blocks == 1)
        rows<Codes, N>(M, codes, scales, x, j.x_stride, tiles, out);
      else
        rows<Panel, N>(M, Panel{j.scratch}, scales, x, j.x_stride, tiles, out);
      t += M;
    }
  }
}

template <int N>
static void run(const Job& j, int64_t tile, int64_t tile_end) {
  for (; tile + N <= tile_end; tile += N) tile_rows<N>(j, tile);
  for (; tile < tile_end; tile++) tile_rows<1>(j, tile);
}

}  // namespace fp8

constexpr size_t linear_fp8_scratch_bytes = (size_t)fp8::panel_rows * fp8::block_tiles * fp8::tile_steps * 64;

// BF16 rows; both phases are one family.
static void linear_fp8(const Matrix& w, const float* bias, const uint8_t* x, int64_t x_stride, int64_t T, int64_t tile_begin,
                       int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch) {
  const fp8::Job job = {w, bias, x, x_stride, T, y, y_stride, scratch};
  switch (T) {
    case 0:
      return;
    case 1:
      return fp8::run<fp8::tiles_for(1)>(job, tile_begin, tile_end);
    case 2:
      return fp8::run<fp8::tiles_for(2)>(job, tile_begin, tile_end);
    default:
      return fp8::run<fp8::panel_rows>(job, tile_begin, tile_end);
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
