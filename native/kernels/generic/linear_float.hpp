// y = x W^T + bias for F32 weights with F32 rows, and BF16 weights with BF16 rows.
//
// The same arithmetic per variant for any T, tile range and phase: each output is ONE chain of fused multiply-adds over
// ascending columns (BF16: ascending pairs, added as in the lanes' dot_bf16), with the bias added last. Blocking along columns
// stores the chain in y and resumes it, which does not change the result.
//
// A lane is an output row; a step is 64 bytes of weights (16 rows x 4 bytes) times 4 broadcast bytes of activations: one F32
// column, or two BF16 columns. Steps of a tile row are contiguous, across tiles. A block is M tokens x N tiles of accumulators
// in registers. Few rows stream the weights once (limited by memory); more rows process a panel of weights that stays in L1.
#pragma once
#include <cstdint>
#include <cstring>

#include "../kernels.hpp"
#include "dso.h"

namespace dso::DSO_ISA_NAMESPACE {
namespace floating {

// Tokens per block: widening BF16 without a bf16 instruction needs registers that six tokens would use.
template <int format>
constexpr int max_tokens = registers >= 32 || format == DSO_F32 ? 6 : 4;
constexpr int step_bytes = 64;
constexpr int ahead = 1536;                // bytes prefetched ahead of streamed weights
constexpr int64_t panel_bytes = 24 << 10;  // for an L1 of 32 or 48 KB, leaving room for activations and outputs

// Tiles side by side, so that M x N accumulators, N weights and a broadcast fit into the registers.
constexpr int tiles_for(int M) { return registers >= 32 ? 4 : M == 1 ? 4 : M == 2 ? 2 : 1; }
constexpr int64_t panel_steps = panel_bytes / step_bytes / tiles_for(6);

struct Output {       // destination of a block's results
  float* y;           // first token, first tile
  int64_t stride;     // bytes
  int64_t columns;    // outputs that exist from the first tile on; at least one
  const float* bias;  // for the first tile, or null
  bool begin, end;    // begin, end of the columns: start from zero, add the bias
};

// n outputs from p on, at most as many as a tile has.
DSO_INLINE F read(const float* p, int64_t n) { return n >= lanes ? load(p) : load(p, n); }

// M tokens x N tiles over `steps` steps. w_next: bytes from one tile row to the next. stream: w comes from memory.
template <int format, int M, int N, bool stream>
static void block(const uint8_t* w, int64_t w_next, const uint8_t* x, int64_t x_stride, int64_t steps, const Output& out) {
  F acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const float* y = (const float*)((const uint8_t*)out.y + m * out.stride) + n * lanes;
      acc[m][n] = out.begin ? zero() : read(y, out.columns - n * lanes);
    }
  }
  for (int64_t s = 0; s < steps; s++, w += step_bytes, x += 4) {
    if constexpr (stream) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) __builtin_prefetch(w + n * w_next + ahead);
    }
    if constexpr (format == DSO_F32) {
      F weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) weight[n] = load((const float*)(w + n * w_next));
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        float value;
        memcpy(&value, x + m * x_stride, 4);
        const F a = set(value);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[m][n] = fma(weight[n], a, acc[m][n]);
      }
    } else {
      B weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) weight[n] = load_bytes(w + n * w_next);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const B a = broadcast4(x + m * x_stride);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[m][n] = dot_bf16(acc[m][n], weight[n], a);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    const int64_t columns = out.columns - n * lanes;
    const bool biased = out.end && out.bias;
    const F b = biased ? read(out.bias + n * lanes, columns) : zero();
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      float* y = (float*)((uint8_t*)out.y + m * out.stride) + n * lanes;
      store_some(y, biased ? add(acc[m][n], b) : acc[m][n], columns);
    }
  }
}

template <int format, int N, bool stream>
static void rows(int M, const uint8_t* w, int64_t w_next, const uint8_t* x, int64_t x_stride, int64_t steps,
                 const Output& out) {
  switch (M) {
    case 1:
      return block<format, 1, N, stream>(w, w_next, x, x_stride, steps, out);
    case 2:
      return block<format, 2, N, stream>(w, w_next, x, x_stride, steps, out);
    case 3:
      return block<format, 3, N, stream>(w, w_next, x, x_stride, steps, out);
    case 4:
      return block<format, 4, N, stream>(w, w_next, x, x_stride, steps, out);
    case 5:
      return block<format, 5, N, stream>(w, w_next, x, x_stride, steps, out);
    default:
      return block<format, 6, N, stream>(w, w_next, x, x_stride, steps, out);
  }
}

struct Job {
  const uint8_t* w;  // packed matrix
  int64_t w_next;    // bytes per tile row
  int64_t steps;     // per row
  int64_t outputs;   // outputs of the matrix
  const float* bias;
  const uint8_t* x;
  int64_t x_stride, T;
  float* y;
  int64_t y_stride;

  Output output(int64_t tile, int64_t token) const {
    return {(float*)((uint8_t*)y + token * y_stride) + tile * lanes,
            y_stride,
            outputs - tile * lanes,
            bias ? bias + tile * lanes : nullptr,
            true,
            true};
  }
};

// ---- few rows: every weight is read once, whole rows at a time

template <int format, int M>
static void stream(const Job& j, int64_t tile, int64_t tile_end) {
  constexpr int N = tiles_for(M);
  for (; tile + N <= tile_end; tile += N)
    block<format, M, N, true>(j.w + tile * j.w_next, j.w_next, j.x, j.x_stride, j.steps, j.output(tile, 0));
  for (; tile < tile_end; tile++)
    block<format, M, 1, true>(j.w + tile * j.w_next, j.w_next, j.x, j.x_stride, j.steps, j.output(tile, 0));
}

// ---- many rows: panels

// N tiles times all rows, with panels of `panel_steps` steps of weights.
template <int format, int N>
static void panels(const Job& j, int64_t tile) {
  const int64_t blocks = (j.T + max_tokens<format> - 1) / max_tokens<format>;
  for (int64_t s = 0; s < j.steps; s += panel_steps) {
    const int64_t steps = j.steps - s < panel_steps ? j.steps - s : panel_steps;
    const uint8_t* w = j.w + tile * j.w_next + s * step_bytes;
    for (int64_t b = 0, t = 0; b < blocks; b++) {  // blocks of even size, so that none has a single row
      const int M = (int)((b + 1) * j.T / blocks - t);
      Output out = j.output(tile, t);
      out.begin = s == 0;
      out.end = s + steps == j.steps;
      const uint8_t* x = j.x + t * j.x_stride + 4 * s;
      if (b == 0)
        rows<format, N, true>(M, w, j.w_next, x, j.x_stride, steps, out);  // later blocks find the panel in L1
      else
        rows<format, N, false>(M, w, j.w_next, x, j.x_stride, steps, out);
      t += M;
    }
  }
}

template <int format>
static void run(const Job& j, int64_t tile, int64_t tile_end) {
  if (j.T > max_tokens<format>) {
    constexpr int N = tiles_for(max_tokens<format>);
    for (; tile + N <= tile_end; tile += N) panels<format, N>(j, tile);
    for (; tile < tile_end; tile++) panels<format, 1>(j, tile);
    return;
  }
  switch (j.T) {
    case 1:
      return stream<format, 1>(j, tile, tile_end);
    case 2:
      return stream<format, 2>(j, tile, tile_end);
    case 3:
      return stream<format, 3>(j, tile, tile_end);
    case 4:
      return stream<format, 4>(j, tile, tile_end);
    case 5:
      return stream<format, 5>(j, tile, tile_end);
    case 6:
      return stream<format, 6>(j, tile, tile_end);
  }
}

}  // namespace floating

constexpr size_t linear_float_scratch_bytes = 0;

// F32 rows for F32 weights, BF16 rows for BF16 weights; both phases are one family.
static void linear_float(const Matrix& w, const float* bias, [[maybe_unused]] int32_t kind, const uint8_t* x, int64_t x_stride,
                         int64_t T, [[maybe_unused]] bool prefill, int64_t tile_begin, int64_t tile_end, float* y,
                         int64_t y_stride, [[maybe_unused]] uint8_t* scratch) {
  const int64_t groups = (w.cols + 31) / 32, columns = w.format == DSO_F32 ? 1 : 2;  // columns per step
  const floating::Job job = {
      w.data,  groups * 32 / columns * floating::step_bytes, (w.cols + columns - 1) / columns, w.rows, bias, x, x_stride, T, y,
      y_stride};
  if (w.format == DSO_F32)
    floating::run<DSO_F32>(job, tile_begin, tile_end);
  else
    floating::run<DSO_BF16>(job, tile_begin, tile_end);
}

}  // namespace dso::DSO_ISA_NAMESPACE
