// y = x W^T + bias on tile registers (tile.hpp, or its emulation): blocks of two tiles of tokens by two tiles of outputs.
//
// Integer formats: bitwise equal to generic/linear_int.hpp. A tile product covers one group of 32 columns, because every group
// has its own scales; its int32 results go through memory to the same ordered float epilogue, so tiles and vectors are one
// family and are chosen only by speed. The high and low bytes of Q16 rows are the two tiles of tokens.
//
// BF16: the prefill family of this ISA. Tile products of 32 columns, ascending, each added to C as TDPBF16PS does; bias last.
// Decode uses the vector kernel. A family must not depend on the token count, so prefill uses tiles even for a single token.
//
// FP8: any number of rows, since both phases are one family (linear_grid.hpp). The codes of 128 columns of two tile rows are
// expanded to bf16 once for all tokens. Their products, which share a scale, are added up in C; then, as in
// generic/linear_fp8.hpp, acc = fma(sum, scale, acc), and the bias last.
//
// Other formats, integer formats with two scales per 32 columns, and few tokens use the vector kernels of AVX-512 with BF16.
#pragma once
#include <cstdint>

#include "../kernels.hpp"
#include "dso.h"
// After those headers, whose names they use.
#include "../generic/math.hpp"
#include "../generic/convert.hpp"
#include "../generic/linear_fp8.hpp"
#include "../generic/linear_int.hpp"

// What `make bench-amx` varies; not measured on a processor with AMX yet.
#ifndef DSO_AMX_VECTOR_TOKENS
#define DSO_AMX_VECTOR_TOKENS 4
#endif
#ifndef DSO_AMX_PANEL_GROUPS
#define DSO_AMX_PANEL_GROUPS 16
#endif

namespace dso::avx512_bf16 {
extern const LinearKernels linear_kernels;
}

namespace dso::DSO_ISA_NAMESPACE {
namespace tiled {

constexpr int64_t vector_tokens =
    DSO_AMX_VECTOR_TOKENS;  // up to this number a tile of 16 tokens is mostly empty, and integer vectors are faster
constexpr int panel_groups = DSO_AMX_PANEL_GROUPS;  // two tile rows of unpacked weights: 20 KB
constexpr int flight_groups = 4;                    // int32 results in flight: 16 KB

struct alignas(64) Scratch {
  uint8_t panel[2][panel_groups * Unpacked<DSO_Q4_1>::bytes];
  int32_t c[flight_groups][4][16][16];  // C tiles: [group][tile][token][output]
};

// ---- integers

// One token's groups [g0, g1) of one tile row: `high` and `low` are its rows of C, with `step` from one group to the next.
template <class W, int kind>
static F epilogue(F acc, const int32_t* high, const int32_t* low, const uint8_t* panel, const float* scales,
                  const int32_t* sums, int groups) {
  constexpr int64_t step = 4 * 16 * 16;
  for (int g = 0; g < groups; g++, panel += W::bytes) {
    I dot = load_bytes(high + g * step);
    if constexpr (kind == DSO_SLOT_Q16) dot = iadd(shl<8>(dot), load_bytes(low + g * step));
    dot = iadd(dot, iset(-W::offset * sums[g]));
    const F a = set(scales[g]);
    acc = fma(to_float(dot), mul(W::scale(panel), a), acc);
    if constexpr (W::has_min) acc = fma(mul(W::min(panel), a), set((float)sums[g]), acc);
  }
  return acc;
}

// A block of tokens: Q8 up to 32, Q16 up to 16. Groups [g0, g1) are in the panel; sums are stored in y between panels.
template <class W, int kind>
static void int_block(Tiles& tiles, Scratch& s, const Output& out, Rows<kind> x, int64_t t, int tokens, int64_t tile, bool two,
                      int64_t g0, int64_t g1) {
  constexpr bool wide = kind == DSO_SLOT_Q16;
  const int first = tokens < 16 ? tokens : 16, second = wide ? first : tokens - first;
  const Rows<kind> rows = x.from(t);
  const uint8_t* a0 = rows.codes(0);
  const uint8_t* a1 = wide ? a0 + x.width : rows.codes(16);
  const int64_t last = x.width / 32;
  for (int64_t g = g0; g < g1; g += flight_groups) {
    const int groups = (int)(g1 - g < flight_groups ? g1 - g : flight_groups);
    const int64_t at = (g - g0) * W::bytes;
    for (int i = 0; i < groups; i++) {
      tiles.load<4>(a0 + 32 * (g + i), x.stride);
      tiles.load<6>(s.panel[0] + at + i * W::bytes, 64);
      tiles.zero<0>(), tiles.dot_s8_u8<0, 4, 6>(), tiles.store<0>(s.c[i][0], 64);
      if (two) {
        tiles.load<7>(s.panel[1] + at + i * W::bytes, 64);
        tiles.zero<1>(), tiles.dot_s8_u8<1, 4, 7>(), tiles.store<1>(s.c[i][1], 64);
      }
      if (second) {
        tiles.load<5>(a1 + 32 * (g + i), x.stride);
        tiles.zero<2>(), tiles.dot_s8_u8<2, 5, 6>(), tiles.store<2>(s.c[i][2], 64);
        if (two) tiles.zero<3>(), tiles.dot_s8_u8<3, 5, 7>(), tiles.store<3>(s.c[i][3], 64);
      }
    }
    for (int m = 0; m < tokens; m++) {
      for (int n = 0; n <= (int)two; n++) {
        const int64_t outputs = out.rows - 16 * (tile + n);
        float* y = (float*)((uint8_t*)out.y + (t + m) * out.stride) + 16 * (tile + n);
        F acc = g == 0 ? zero() : load(y, outputs);
        const int half = wide ? 0 : m / 16;
        acc = epilogue<W, kind>(acc, s.c[0][2 * half + n][m % 16], s.c[0][2 + n][m % 16], s.panel[n] + at, rows.scales(m) + g,
                                rows.sums(m) + g, groups);
        if (g + groups == last)
          finish(out, t + m, tile + n, acc);
        else
          store(y, acc, outputs);
      }
    }
  }
}

template <int format, int kind>
static void integers(const Matrix& w, const Output& out, Rows<kind> x, int64_t T, int64_t begin, int64_t end,
                     uint8_t* scratch) {
  using P = Packed<format>;
  using W = Unpacked<format>;
  constexpr int block = kind == DSO_SLOT_Q16 ? 16 : 32;
  Scratch& s = *(Scratch*)scratch;
  Tiles tiles(32);
  const int64_t all = x.width / 32, row_bytes = all * tile_bytes(format);
  for (int64_t tile = begin; tile < end; tile += 2) {
    const bool two = tile + 1 < end;
    for (int64_t g0 = 0; g0 < all; g0 += panel_groups) {
      const int64_t g1 = all - g0 < panel_groups ? all : g0 + panel_groups;
      for (int n = 0; n <= (int)two; n++)
        for (int64_t g = g0; g < g1; g++)
          W::unpack(P::place(w.data + (tile + n) * row_bytes, g, all), s.panel[n] + (g - g0) * W::bytes);
      for (int64_t t = 0; t < T; t += block) {
        const int tokens = (int)(T - t < block ? T - t : block);
        const int first = tokens < 16 ? tokens : 16;
        if (t == 0 || tokens < block) tiles.shape(first, kind == DSO_SLOT_Q16 ? first : tokens - first);
        int_block<W, kind>(tiles, s, out, x, t, tokens, tile, two, g0, g1);
      }
    }
  }
}

template <int kind>
static void by_format(const Matrix& w, const Output& out, Rows<kind> x, int64_t T, int64_t begin, int64_t end,
                      uint8_t* scratch) {
  switch (w.format) {
    case DSO_INT8:
      return integers<DSO_INT8, kind>(w, out, x, T, begin, end, scratch);
    case DSO_INT4:
      return integers<DSO_INT4, kind>(w, out, x, T, begin, end, scratch);
    case DSO_INT3:
      return integers<DSO_INT3, kind>(w, out, x, T, begin, end, scratch);
    case DSO_Q4_1:
      return integers<DSO_Q4_1, kind>(w, out, x, T, begin, end, scratch);
    case DSO_INT8_NESTED:
      return integers<DSO_INT8_NESTED, kind>(w, out, x, T, begin, end, scratch);
    case DSO_INT4_NESTED:
      return integers<DSO_INT4_NESTED, kind>(w, out, x, T, begin, end, scratch);
    case DSO_Q4_K:
      return integers<DSO_Q4_K, kind>(w, out, x, T, begin, end, scratch);
    case DSO_Q5_K:
      return integers<DSO_Q5_K, kind>(w, out, x, T, begin, end, scratch);
    case DSO_IQ4_XS:
      return integers<DSO_IQ4_XS, kind>(w, out, x, T, begin, end, scratch);
    case DSO_IQ4_NL:
      return integers<DSO_IQ4_NL, kind>(w, out, x, T, begin, end, scratch);
    case DSO_Q5_0:
      return integers<DSO_Q5_0, kind>(w, out, x, T, begin, end, scratch);
    case DSO_Q5_1:
      return integers<DSO_Q5_1, kind>(w, out, x, T, begin, end, scratch);
    case DSO_MXFP4:
      return integers<DSO_MXFP4, kind>(w, out, x, T, begin, end, scratch);
  }
}

// ---- bf16

// C of up to 32 tokens x 2 tile rows over `groups` groups of 32 columns, from the zeros that shape() has set. b1: null if there
// is no second tile row.
static void bf16_block(Tiles& tiles, const uint8_t* a, int64_t stride, bool second, const uint8_t* b0, const uint8_t* b1,
                       int64_t groups, int32_t (*c)[16][16]) {
  constexpr int64_t tile_bytes = 1024;
  for (int64_t g = 0; g < groups; g++) {
    tiles.load<4>(a + 64 * g, stride);
    tiles.load<6>(b0 + g * tile_bytes, 64);
    tiles.dot_bf16<0, 4, 6>();
    if (b1) {
      tiles.load<7>(b1 + g * tile_bytes, 64);
      tiles.dot_bf16<1, 4, 7>();
    }
    if (second) {
      tiles.load<5>(a + 16 * stride + 64 * g, stride);
      tiles.dot_bf16<2, 5, 6>();
      if (b1) tiles.dot_bf16<3, 5, 7>();
    }
  }
  tiles.store<0>(c[0], 64);
  if (b1) tiles.store<1>(c[1], 64);
  if (second) tiles.store<2>(c[2], 64);
  if (second && b1) tiles.store<3>(c[3], 64);
}

static void floats(const Matrix& w, const Output& out, const uint8_t* x, int64_t stride, int64_t T, int64_t begin, int64_t end,
                   uint8_t* scratch) {
  constexpr int64_t tile_bytes = 1024;
  auto& c = ((Scratch*)scratch)->c[0];
  Tiles tiles(64);
  const int64_t groups = padded(w.cols) / 32, row_bytes = groups * tile_bytes;
  for (int64_t tile = begin; tile < end; tile += 2) {
    const bool two = tile + 1 < end;
    const uint8_t* b = w.data + tile * row_bytes;
    for (int64_t t = 0; t < T; t += 32) {
      const int tokens = (int)(T - t < 32 ? T - t : 32);
      const int first = tokens < 16 ? tokens : 16, second = tokens - first;
      tiles.shape(first, second);  // and sets C to zero
      const uint8_t* a = x + t * stride;
      bf16_block(tiles, a, stride, second > 0, b, two ? b + row_bytes : nullptr, groups, c);
      for (int m = 0; m < tokens; m++)
        for (int n = 0; n <= (int)two; n++) finish(out, t + m, tile + n, load((const float*)c[m / 16 * 2 + n][m % 16]));
    }
  }
}

// ---- FP8

// Blocks of 128 columns, ascending; sums are stored in y between them.
static void fp8_rows(const Matrix& w, const Output& out, const uint8_t* x, int64_t stride, int64_t T, int64_t begin,
                     int64_t end, uint8_t* scratch) {
  static_assert(sizeof Scratch::panel[0] >= 1024 * fp8::block_tiles);
  Scratch& s = *(Scratch*)scratch;
  auto& c = s.c[0];
  Tiles tiles(64);
  const int64_t groups = padded(w.cols) / 32, next = groups * fp8::tile_bytes;
  for (int64_t tile = begin; tile < end; tile += 2) {
    const bool two = tile + 1 < end;
    for (int64_t g = 0; g < groups; g += fp8::block_tiles) {
      const int count = (int)(groups - g < fp8::block_tiles ? groups - g : fp8::block_tiles);
      const fp8::Codes codes = {w.data + tile * next + g * fp8::tile_bytes, next};
      F scales[2];
      for (int n = 0; n <= (int)two; n++) {
        scales[n] = set(fp8::scale_of(codes.at + n * next));
        uint8_t* to = s.panel[n];
        for (int i = 0; i < count; i++)
          for (int four = 0; four < fp8::tile_steps / 2; four++, to += 128) {
            store_bytes(to, fp8::Codes::step<2, 0>(codes, n, i, four));
            store_bytes(to + 64, fp8::Codes::step<2, 1>(codes, n, i, four));
          }
      }
      for (int64_t t = 0; t < T; t += 32) {
        const int tokens = (int)(T - t < 32 ? T - t : 32);
        const int first = tokens < 16 ? tokens : 16, second = tokens - first;
        tiles.shape(first, second);  // and sets C to zero
        const uint8_t* a = x + t * stride + 64 * g;
        bf16_block(tiles, a, stride, second > 0, s.panel[0], two ? s.panel[1] : nullptr, count, c);
        for (int m = 0; m < tokens; m++)
          for (int n = 0; n <= (int)two; n++) {
            const int64_t outputs = out.rows - 16 * (tile + n);
            float* y = (float*)((uint8_t*)out.y + (t + m) * out.stride) + 16 * (tile + n);
            const F sum = load((const float*)c[m / 16 * 2 + n][m % 16]);
            const F acc = fma(sum, scales[n], g == 0 ? zero() : load(y, outputs));
            if (g + fp8::block_tiles >= groups)
              finish(out, t + m, tile + n, acc);
            else
              store(y, acc, outputs);
          }
      }
    }
  }
}

}  // namespace tiled

static void linear_amx(const Matrix& w, const float* bias, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T,
                       bool prefill, int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch) {
  const Output out = {bias, y, y_stride, w.rows};
  if (w.format == DSO_BF16 && prefill) return tiled::floats(w, out, x, x_stride, T, tile_begin, tile_end, scratch);
  if (w.format == DSO_FP8) return tiled::fp8_rows(w, out, x, x_stride, T, tile_begin, tile_end, scratch);
  if (T > tiled::vector_tokens && int_layout(w.format).halves == 1) {
    if (kind == DSO_SLOT_Q8)
      return tiled::by_format<DSO_SLOT_Q8>(w, out, {x, x_stride, padded(w.cols)}, T, tile_begin, tile_end, scratch);
    if (kind == DSO_SLOT_Q16)
      return tiled::by_format<DSO_SLOT_Q16>(w, out, {x, x_stride, padded(w.cols)}, T, tile_begin, tile_end, scratch);
  }
  avx512_bf16::linear_kernels.linear(w, bias, kind, x, x_stride, T, prefill, tile_begin, tile_end, y, y_stride, scratch);
}

}  // namespace dso::DSO_ISA_NAMESPACE
