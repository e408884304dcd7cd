// y = x W^T for weights in integer formats (tile_bytes.hpp) and integer activations (Q8, Q16). The same arithmetic for every
// token count, tile range and ISA: exact int32 dot products over the 32 or 16 columns that share a scale, then, over ascending
// columns,
//   acc = fma(float(dot), scale_w * scale_a, acc);  with minimums also  acc = fma(min * scale_a, float(sum a), acc);
// and y = acc + bias. In superblocks scale_w = d * scale and min = dmin * min, which are exact.
//
// A few tile rows are multiplied by all tokens, 4 at a time, while the next tile rows are prefetched into L2. Packed tiles are
// read directly: unpacking uses ports that dot products leave free. Measured on Zen 5, panels of unpacked weights in L1, blocks
// of K and cache-sized blocks of tokens gained nothing at any token count from 8 to 512. Formats with a trellis are the
// exception: unpacking takes them longer than the dot products of 4 tokens, so they are unpacked to panels, once for all
// tokens. A variant whose products read another order than the packed one (neon/panels.hpp) unpacks all formats.
#pragma once
#include "int_tiles.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// ---- activations: rows of Q8 or Q16.
template <int kind>
struct Rows {
  static constexpr int slot = kind;
  const uint8_t* x;
  int64_t stride, width;  // bytes; columns padded to 32
  Rows from(int64_t t) const { return {x + t * stride, stride, width}; }
  const uint8_t* codes(int m) const { return x + m * stride; }
  const float* scales(int m) const { return (const float*)(codes(m) + scales_at<kind>(width)); }
  const int32_t* sums(int m) const { return (const int32_t*)(scales(m) + width / 32); }
  // The sum of the activations that half of group g multiplies, in every lane. The first is computed for both halves once.
  template <int half>
  DSO_INLINE I sum_of_half(const Rows& x, int m, int64_t g) {
    if constexpr (half == 1) return isub(iset(x.sums(m)[g]), sum_of_half<0>(x, m, g));
    const uint8_t* codes = x.codes(m) + 32 * g;
    if constexpr (kind == DSO_SLOT_Q16) return iadd(shl<8>(sum16_i8(codes)), sum16_i8(codes + x.width));
    return sum16_i8(codes);
  }
};

// ---- the inner block: M tokens x N tile rows, `row_bytes` apart.
// acc += the exact dot products of `quads` times 4 columns, from column 4 * first of a group on. Place: W::Place; deduced,
// since GCC cannot order overloads by their constraints otherwise (neon/lane_dots.hpp).
template <class W, int first, int quads, int M, int N, class Place>
DSO_INLINE void dots(I (&acc)[M][N], Place w, int64_t row_bytes, const uint8_t* x, int64_t stride) {
  // Otherwise sums of small codes are 16-bit for as many quads as cannot overflow: each adds two products of at most
  // largest * 128.
  constexpr int possible = 32767 / (256 * W::largest), run = has_dot_int ? 0 : possible < quads ? possible : quads;
  // For one token, two chains of dot products: one would take longer than unpacking the weights.
  constexpr bool two_chains = M * N == 1 && run == 0;
  I sum[M][N], odd = izero();
#pragma GCC unroll 8
  for (int i = 0; i < quads; ++i) {
    B b[N];
    for (int n = 0; n < N; ++n) b[n] = W::quad(w.rows_below(n * row_bytes), first + i);
    for (int m = 0; m < M; ++m) {
      const B a = broadcast4(x + m * stride + 4 * (first + i));
      for (int n = 0; n < N; ++n) {
        if constexpr (run > 0) {
          sum[m][n] = pairs_u7(i % run ? sum[m][n] : izero(), b[n], a);
          if (i % run == run - 1 || i == quads - 1) acc[m][n] = iadd(acc[m][n], add_pairs(sum[m][n]));
        } else {
          I& to = two_chains && i % 2 ? odd : acc[m][n];
          to = W::largest <= 127 ? dot_u7(to, b[n], a) : dot_u8(to, b[n], a);
        }
      }
    }
  }
  if constexpr (two_chains) acc[0][0] = iadd(acc[0][0], odd);
}

// dot = start + the same products with activations of a kind; `x`: those of the group, of rows `stride` bytes apart; `width`:
// bytes from high bytes to low ones.
template <class W, int kind, int first, int quads, int M, int N, class Place>
DSO_INLINE void group_dots(I (&dot)[M][N], const I (&start)[M], Place w, int64_t row_bytes, const uint8_t* x, int64_t stride,
                           int64_t width) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) dot[m][n] = kind == DSO_SLOT_Q16 ? izero() : start[m];
  dots<W, first, quads>(dot, w, row_bytes, x, stride);
  if constexpr (kind == DSO_SLOT_Q16) {  // so far the high bytes
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = iadd(shl<8>(dot[m][n]), start[m]);
    dots<W, first, quads>(dot, w, row_bytes, x + width, stride);
  }
}

// Prefetching: the hardware's own prefetchers stop at every page.
// Stream: prefetches weights `distance` bytes ahead, for weights that only one block of tokens uses.
struct Stream {
  static constexpr bool few_tokens = true;  // at most few_rows
  template <class W>
  inline __attribute__((always_inline)) void step(const uint8_t* w) {
    constexpr int64_t distance = 8192;
    for (int64_t i = 0; i < W::bytes; i += 64) __builtin_prefetch(w + distance + i);
  }
  // The same for split formats, whose tile rows `row` are streams of groups with gaps between them.
  template <class W>
  inline __attribute__((always_inline)) void ahead(const uint8_t* row, int64_t row_bytes, int64_t g, int64_t groups) {
    constexpr int64_t distance = 8192 / W::bytes;  // in groups
    const int64_t to = g + (distance < groups ? distance : groups), below = to < groups ? 0 : 1;
    const typename W::Place at = W::place(row + below * row_bytes, to - below * groups, groups);
    for (int64_t i = 0; i < W::bytes; i += 64) __builtin_prefetch(at.group + i);
    if constexpr (W::joins)
      for (int64_t i = 0; i < 256; i += 64) __builtin_prefetch(at.head + i);
  }
};
// Later: prefetches what is read after the product into L2, in equal portions over `steps`.
struct Later {
  const Fetch *at, *end;
  int64_t portion, done = 0;  // bytes per step, a multiple of 64; bytes of *at that have been fetched

  Later(const Matrix& w, int64_t steps) : at(w.next), end(w.next_end) {
    int64_t bytes = 0;
    for (const Fetch* f = at; f != end; ++f) bytes += f->bytes;
    portion = (bytes / steps + 64) / 64 * 64;
  }
  inline __attribute__((always_inline)) void step() {
    if (at == end) return;
    for (int64_t i = 0; i < portion; i += 64) __builtin_prefetch(at->data + done + i, 0, 2);
    done += portion;
    if (done < at->bytes) return;
    ++at;
    done = 0;
  }
};
// Ahead: prefetches the next tile rows into L2, in equal portions while all blocks of tokens use the current ones.
struct Ahead {
  static constexpr bool few_tokens = false;
  const uint8_t *at, *end;  // of what is left of a tile row
  int64_t portion;          // bytes per group, a multiple of 64
  Later& later;
  int64_t rows = 0, row_bytes = 0, used = 0;  // tile rows after this one, and their bytes, of which the first are used
  template <class W>
  inline __attribute__((always_inline)) void step(const uint8_t*) {
    later.step();
    if (at >= end) {
      if (rows == 0) return;
      --rows, end += row_bytes, at = end - used;
    }
    for (int64_t i = 0; i < portion; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += portion;
  }
};

// One half of a group, or a whole one if it has a single scale.
template <class W, int half, int kind, int M, int N>
DSO_INLINE void accumulate_half(F (&acc)[M][N], typename W::Place w, int64_t row_bytes, const Rows<kind>& x, int64_t g) {
  constexpr int quads = 8 / W::halves, first = half * quads;
  I start[M], dot[M][N];
  F sum[M];
  for (int m = 0; m < M; ++m) {
    if constexpr (W::halves == 1) {
      start[m] = iset((W::dot_bias - W::offset) * x.sums(m)[g]);
      sum[m] = set((float)x.sums(m)[g]);
    } else {
      const I s = Rows<kind>::template sum_of_half<half>(x, m, g);
      start[m] = W::offset ? isub(izero(), shl<W::offset ? __builtin_ctz(W::offset) : 0>(s)) : izero();
      sum[m] = to_float(s);
    }
  }
  group_dots<W, kind, first, quads>(dot, start, w, row_bytes, x.codes(0) + 32 * g, x.stride, x.width);
  for (int n = 0; n < N; ++n) {
    const typename W::Place at = w.rows_below(n * row_bytes);
    const F scale = W::template scale<half>(at);
    for (int m = 0; m < M; ++m) {
      const F a = set(x.scales(m)[g]);
      acc[m][n] = fma(to_float(dot[m][n]), mul(scale, a), acc[m][n]);
      if constexpr (W::has_min) acc[m][n] = fma(mul(W::template min<half>(at), a), sum[m], acc[m][n]);
    }
  }
}

// All groups of M tokens x N tile rows.
template <class W, int kind, int M, int N, class Fetch>
DSO_INLINE void accumulate(F (&acc)[M][N], const uint8_t* w, int64_t row_bytes, const Rows<kind>& x, Fetch& fetch) {
  const int64_t groups = x.width / 32;
  const auto group = [&](typename W::Place at, int64_t g) {
    if constexpr (W::layout.split && Fetch::few_tokens)
      fetch.template ahead<W>(w, row_bytes, g, groups);
    else
      fetch.template step<W>(at.group);
    accumulate_half<W, 0>(acc, at, row_bytes, x, g);
    if constexpr (W::halves == 2) accumulate_half<W, 1>(acc, at, row_bytes, x, g);
  };
  if constexpr (W::layout.superblock) {  // loops of their own, out of which the compiler moves what all of their groups use
    constexpr int64_t bytes = superblock_groups * W::bytes + head_bytes(W::layout);
    for (int64_t first = 0; first < groups; first += superblock_groups, w += bytes)
      for (int64_t i = 0; i < superblock_groups; ++i) group(W::place(w, i, groups), first + i);
  } else {
    for (int64_t g = 0; g < groups; ++g) group(W::place(w, g, groups), g);
  }
}

// ---- outputs
struct Output {
  const float* bias;  // or null
  float* y;
  int64_t stride, rows;  // bytes; outputs past `rows` are not written
};

DSO_INLINE float* outputs(const Output& out, int64_t t, int64_t tile) {
  return (float*)((uint8_t*)out.y + t * out.stride) + 16 * tile;
}
DSO_INLINE F load_sums(const Output& out, int64_t t, int64_t tile) {
  const int64_t n = out.rows - 16 * tile;
  return n >= 16 ? load(outputs(out, t, tile)) : load(outputs(out, t, tile), n);
}
DSO_INLINE void store_sums(const Output& out, int64_t t, int64_t tile, F acc) {
  const int64_t n = out.rows - 16 * tile;
  if (n >= 16) return store(outputs(out, t, tile), acc);
  store(outputs(out, t, tile), acc, n);
}
DSO_INLINE void finish(const Output& out, int64_t t, int64_t tile, F acc) {
  const int64_t n = out.rows - 16 * tile;
  if (out.bias) acc = add(acc, n >= 16 ? load(out.bias + 16 * tile) : load(out.bias + 16 * tile, n));
  store_sums(out, t, tile, acc);
}

template <int format, int kind, int M, int N, class Fetch>
static void block(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t t, int64_t tile, Fetch& fetch) {
  const int64_t row_bytes = x.width / 32 * tile_bytes(format);
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  accumulate<Packed<format>, kind, M, N>(acc, w.data + tile * row_bytes, row_bytes, x.from(t), fetch);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) finish(out, t + m, tile + n, acc[m][n]);
}

constexpr int block_rows = 4;  // tokens per block

// Up to this number of tokens, tile rows are multiplied one after the other by all tokens at once. Unpacking trellis codes
// takes more instructions than the products of 4 tokens leave room for.
template <int format>
constexpr int few_rows = Format<format>::layout.trellis && registers >= 32 && has_dot_int ? 8 : block_rows;

// Formats that only files use are compiled for blocks of 1 and block_rows tokens: every shape of every format would make the
// build several times as long.
template <int format>
constexpr bool all_shapes =
    format == DSO_INT8 || format == DSO_INT4 || format == DSO_INT3 || format == DSO_Q4_1 || Format<format>::layout.split;

// Calls f<M>, where M is the number of tokens, or `most` if there are more.
template <int most, class Function>
DSO_INLINE void with_constant(int64_t tokens, const Function& f) {
  if constexpr (most > 1)
    if (tokens < most) return with_constant<most - 1>(tokens, f);
  f.template operator()<most>();
}

template <int format, int kind, int N, class Fetch>
static void up_to_a_block(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t t, int64_t tokens, int64_t tile,
                          Fetch& fetch) {
  constexpr int most = Fetch::few_tokens ? few_rows<format> : block_rows;
  if constexpr (all_shapes<format>) {
    with_constant<most>(tokens, [&]<int M>() { block<format, kind, M, N>(w, out, x, t, tile, fetch); });
  } else if (tokens >= block_rows) {
    block<format, kind, block_rows, N>(w, out, x, t, tile, fetch);
  } else if constexpr (Fetch::few_tokens) {
    for (int64_t i = 0; i < tokens; ++i) block<format, kind, 1, N>(w, out, x, t + i, tile, fetch);
  } else {  // the last block_rows tokens; some are computed again, with equal results
    block<format, kind, block_rows, N>(w, out, x, t + tokens - block_rows, tile, fetch);
  }
}

// N tile rows and all tokens, block after block: the tokens of a block share each weight, and the tile rows each activation.
template <int format, int kind, int N>
static void some_tiles(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t T, int64_t tile, Later& later) {
  const int64_t groups = x.width / 32, row_bytes = groups * tile_bytes(format), blocks = (T + block_rows - 1) / block_rows;
  const uint8_t* next = w.data + (tile + N) * row_bytes;  // past the last tile row nothing is read, only prefetched
  // Of a nested format only the groups, without the planes at the end of each tile row.
  constexpr bool gaps = Format<format>::layout.nested;
  const int64_t used = gaps ? groups * Packed<format>::bytes : N * row_bytes, portion = used / groups * (gaps ? N : 1) / blocks;
  Ahead fetch = {next, next + used, (portion + 63) / 64 * 64, later, gaps ? N - 1 : 0, row_bytes, used};
  for (int64_t t = 0; t < T; t += block_rows) up_to_a_block<format, kind, N>(w, out, x, t, T - t, tile, fetch);
}

// ---- panels of unpacked weights
#ifdef DSO_OWN_PANELS  // a variant's own, defined before this file, for all formats
template <int format>
using Panel = DSO_OWN_PANELS<format>;
constexpr bool own_panels = true;
#else
template <int format>
using Panel = Unpacked<format>;
constexpr bool own_panels = false;
#endif
constexpr int panel_groups = 16;  // of each tile row; panels of 3 tile rows take 27 KB

// M tokens x N tile rows, groups [g0, g1), which are in the panel. Between panels, sums are in y.
template <class W, int kind, int M, int N>
static void panel_block(const uint8_t* panel, const Output& out, const Rows<kind>& all, int64_t t, int64_t tile, int64_t g0,
                        int64_t g1) {
  constexpr int64_t row_bytes = panel_groups * W::bytes;
  const Rows<kind> x = all.from(t);
  const bool last = g1 == x.width / 32;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = g0 ? load_sums(out, t + m, tile + n) : zero();
  if constexpr (own_panels) {
    typename W::Sums sums;
    W::load(sums, acc);
    for (int64_t g = g0; g < g1; ++g) W::add(sums, panel + (g - g0) * W::bytes, x, g);
    W::store(sums, acc);
  } else {
    for (int64_t g = g0; g < g1; ++g) {
      accumulate_half<W, 0>(acc, W::place(panel, g - g0), row_bytes, x, g);
      if constexpr (W::halves == 2) accumulate_half<W, 1>(acc, W::place(panel, g - g0), row_bytes, x, g);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      if (last)
        finish(out, t + m, tile + n, acc[m][n]);
      else
        store_sums(out, t + m, tile + n, acc[m][n]);
}

// N tile rows and all tokens.
template <int format, int kind, int N>
static void unpacked_tiles(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t T, int64_t tile) {
  using P = Packed<format>;
  using W = Panel<format>;
  alignas(64) uint8_t panel[N * panel_groups * W::bytes];
  const int64_t groups = x.width / 32, row_bytes = groups * tile_bytes(format);
  const uint8_t* rows = w.data + tile * row_bytes;
  for (int64_t g0 = 0; g0 < groups; g0 += panel_groups) {
    const int64_t g1 = groups - g0 < panel_groups ? groups : g0 + panel_groups;
    // From a group to the same one of the next panel, which is prefetched into L2. Past the last one nothing is read.
    const int64_t next = g1 < groups ? panel_groups * P::bytes : N * row_bytes - g0 * P::bytes;
    for (int n = 0; n < N; ++n)
      for (int64_t g = g0; g < g1; ++g) {
        const typename P::Place from = P::place(rows + n * row_bytes, g, groups);
        for (int64_t i = 0; i < P::bytes; i += 64) __builtin_prefetch(from.group + next + i, 0, 2);
        W::unpack(from, panel + (n * panel_groups + g - g0) * W::bytes);
      }
    if constexpr (own_panels) {  // T is a multiple of block_rows
      for (int64_t t = 0; t < T; t += block_rows) panel_block<W, kind, block_rows, N>(panel, out, x, t, tile, g0, g1);
    } else {
      for (int64_t t = 0; t < T; t += block_rows)
        with_constant<block_rows>(T - t, [&]<int M>() { panel_block<W, kind, M, N>(panel, out, x, t, tile, g0, g1); });
    }
  }
}

template <int format, int kind>
static void linear_int(const Matrix& w, const Output& out, const Rows<kind>& x, int64_t T, int64_t begin, int64_t end) {
  int64_t tile = begin;
  if (T <= few_rows<format>) {  // limited by memory, which is fastest with a single stream
    Stream fetch;
    for (; tile < end; ++tile) up_to_a_block<format, kind, 1>(w, out, x, 0, T, tile, fetch);
    return;
  }
  if constexpr (own_panels) {  // blocks of block_rows tokens, then the rest
    const int64_t whole = T / block_rows * block_rows;
    for (; tile < end; ++tile) {
      unpacked_tiles<format, kind, 1>(w, out, x, whole, tile);
      Stream fetch;
      if (whole < T) up_to_a_block<format, kind, 1>(w, out, x, whole, T - whole, tile, fetch);
    }
  } else {
    // 4 x 3 int32 and 4 x 3 float accumulators; pairs_u7 needs more registers
    constexpr int N = registers >= 32 && has_dot_int ? 3 : 1;
    Later later(w, (T + block_rows - 1) / block_rows * (x.width / 32) * ((end - begin + N - 1) / N));
    const auto tiles = [&]<int n>() {
      for (; tile + n <= end; tile += n)
        if constexpr (Format<format>::layout.trellis)
          unpacked_tiles<format, kind, n>(w, out, x, T, tile);
        else
          some_tiles<format, kind, n>(w, out, x, T, tile, later);
    };
    tiles.template operator()<N>();
    tiles.template operator()<1>();
  }
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
    case DSO_INT3:
      return linear_int<DSO_INT3, kind>(w, out, rows, T, begin, end);
    case DSO_Q4_1:
      return linear_int<DSO_Q4_1, kind>(w, out, rows, T, begin, end);
    case DSO_INT8_NESTED:
      return linear_int<DSO_INT8_NESTED, kind>(w, out, rows, T, begin, end);
    case DSO_INT4_NESTED:
      return linear_int<DSO_INT4_NESTED, kind>(w, out, rows, T, begin, end);
    case DSO_Q2_K:
      return linear_int<DSO_Q2_K, kind>(w, out, rows, T, begin, end);
    case DSO_Q3_K:
      return linear_int<DSO_Q3_K, kind>(w, out, rows, T, begin, end);
    case DSO_Q4_K:
      return linear_int<DSO_Q4_K, kind>(w, out, rows, T, begin, end);
    case DSO_Q5_K:
      return linear_int<DSO_Q5_K, kind>(w, out, rows, T, begin, end);
    case DSO_Q6_K:
      return linear_int<DSO_Q6_K, kind>(w, out, rows, T, begin, end);
    case DSO_IQ4_XS:
      return linear_int<DSO_IQ4_XS, kind>(w, out, rows, T, begin, end);
    case DSO_IQ4_NL:
      return linear_int<DSO_IQ4_NL, kind>(w, out, rows, T, begin, end);
    case DSO_Q5_0:
      return linear_int<DSO_Q5_0, kind>(w, out, rows, T, begin, end);
    case DSO_Q5_1:
      return linear_int<DSO_Q5_1, kind>(w, out, rows, T, begin, end);
    case DSO_MXFP4:
      return linear_int<DSO_MXFP4, kind>(w, out, rows, T, begin, end);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
