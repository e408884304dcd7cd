// y = x W^T for integer weights (INT8, INT4, Q4_1) and integer activations (Q8, Q16). One numeric recipe for every token
// count, tile range and ISA: exact int32 dots over groups of 32 columns, then groups ascending
//   acc = fma(float(dot), scale_w * scale_a, acc);  Q4_1 also  acc = fma(min * scale_a, float(sum a), acc);
// and y = acc + bias. Two ways through memory share one inner block of M tokens x N tiles:
//   few tokens   stream packed tiles from memory once, nibbles unpacked in registers, prefetched ahead;
//   many tokens  unpack a panel of tiles to bytes and fp32 scales that stay in L1, and run all tokens over it.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

// ---- weights as the inner block sees them: `quads` vectors of 4 columns x 16 rows at a time, and fp32 scales.
template <int format> struct Format {
  static constexpr bool nibbles = format != DSO_INT8;
  static constexpr bool has_min = format == DSO_Q4_1;
  static constexpr int32_t offset = format == DSO_INT8 ? 128 : format == DSO_INT4 ? 8 : 0;  // stored = w + offset
  static constexpr int64_t code_bytes = nibbles ? 256 : 512;
};

template <int format> struct Packed : Format<format> {
  using Base = Format<format>;
  static constexpr int64_t bytes = Base::code_bytes + (Base::has_min ? 64 : 32);
  static constexpr int quads = Base::nibbles ? 2 : 1;
  DSO_INLINE void read(const uint8_t* tile, int64_t i, B (&w)[quads]) {
    const B b = load_bytes(tile + 64 * i);
    if constexpr (Base::nibbles) {
      w[0] = low_nibbles(b);
      w[1] = high_nibbles(b);
    } else {
      w[0] = b;
    }
  }
  DSO_INLINE F scale(const uint8_t* tile) { return load_f16(tile + Base::code_bytes); }
  DSO_INLINE F min(const uint8_t* tile) { return load_f16(tile + Base::code_bytes + 32); }
};

template <int format> struct Unpacked : Format<format> {
  using Base = Format<format>;
  static constexpr int64_t bytes = 512 + (Base::has_min ? 128 : 64);
  static constexpr int quads = 1;
  DSO_INLINE void read(const uint8_t* tile, int64_t i, B (&w)[1]) { w[0] = load_bytes(tile + 64 * i); }
  DSO_INLINE F scale(const uint8_t* tile) { return load((const float*)(tile + 512)); }
  DSO_INLINE F min(const uint8_t* tile) { return load((const float*)(tile + 576)); }

  DSO_INLINE void unpack(const uint8_t* packed, uint8_t* tile) {
    using P = Packed<format>;
    for (int i = 0; i < 8 / P::quads; ++i) {
      B w[P::quads];
      P::read(packed, i, w);
      for (int k = 0; k < P::quads; ++k) store_bytes(tile + 64 * (P::quads * i + k), w[k]);
    }
    store((float*)(tile + 512), P::scale(packed));
    if constexpr (Base::has_min) store((float*)(tile + 576), P::min(packed));
  }
};

// ---- activations: rows of Q8 or Q16.
template <int kind> struct Rows {
  const uint8_t* x;
  int64_t stride, width;  // bytes; columns padded to 32
  Rows from(int64_t t) const { return {x + t * stride, stride, width}; }
  const uint8_t* codes(int m) const { return x + m * stride; }
  const float* scales(int m) const { return (const float*)(codes(m) + scales_at<kind>(width)); }
  const int32_t* sums(int m) const { return (const int32_t*)(scales(m) + width / 32); }
};

// ---- the inner block: M tokens x N tile rows, `row_bytes` apart.
// acc += the exact dots of one group.
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
          if constexpr (pairs) sum[m][n] = pairs_u4(sum[m][n], b[n][k], a);
          else if constexpr (W::nibbles) sum[m][n] = dot_u4(sum[m][n], b[n][k], a);
          else sum[m][n] = dot_u8(sum[m][n], b[n][k], a);
        }
      }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = pairs ? iadd(acc[m][n], add_pairs(sum[m][n])) : sum[m][n];
}

// Asks for what `accumulate` reads `distance` bytes later; past the end of a row that is the next N rows' beginning.
template <class W, int N> DSO_INLINE void prefetch(const uint8_t* w, int64_t row_bytes, int64_t left) {
  constexpr int64_t distance = 2048 / W::bytes * W::bytes;
  const uint8_t* p = w + distance + (left * W::bytes <= distance ? (N - 1) * row_bytes : 0);
  for (int n = 0; n < N; ++n)
    for (int64_t i = 0; i < W::bytes; i += 64) __builtin_prefetch(p + n * row_bytes + i);
}

// acc += groups [g0, g1) of the recipe; w points at group g0 of the first tile row.
template <class W, int kind, int M, int N, bool ahead>
DSO_INLINE void accumulate(F (&acc)[M][N], const uint8_t* w, int64_t row_bytes, Rows<kind> x, int64_t g0, int64_t g1) {
  for (int64_t g = g0; g < g1; ++g, w += W::bytes) {
    if constexpr (ahead) prefetch<W, N>(w, row_bytes, g1 - g);
    I start[M], dot[M][N];
    for (int m = 0; m < M; ++m) start[m] = iset(-W::offset * x.sums(m)[g]);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = kind == DSO_SLOT_Q16 ? izero() : start[m];
    dots<W>(dot, w, row_bytes, x.codes(0) + 32 * g, x.stride);
    if constexpr (kind == DSO_SLOT_Q16) {  // those were the high bytes
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) dot[m][n] = iadd(shl<8>(dot[m][n]), start[m]);
      dots<W>(dot, w, row_bytes, x.codes(0) + x.width + 32 * g, x.stride);
    }
    for (int n = 0; n < N; ++n) {
      const F scale = W::scale(w + n * row_bytes);
      for (int m = 0; m < M; ++m) {
        const F a = set(x.scales(m)[g]);
        acc[m][n] = fma(to_float(dot[m][n]), mul(scale, a), acc[m][n]);
        if constexpr (W::has_min)
          acc[m][n] = fma(mul(W::min(w + n * row_bytes), a), set((float)x.sums(m)[g]), acc[m][n]);
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

constexpr int int_block_tokens = 4;

// ---- few tokens: N tile rows at a time, so that a second block of tokens finds them in the cache.
template <int format, int kind, int M, int N>
static void stream_block(const Matrix& w, const Output& out, Rows<kind> x, int64_t t, int64_t tile) {
  using W = Packed<format>;
  const int64_t groups = x.width / 32, row_bytes = groups * W::bytes;
  F acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = zero();
  accumulate<W, kind, M, N, true>(acc, w.data + tile * row_bytes, row_bytes, x.from(t), 0, groups);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) finish(out, t + m, tile + n, acc[m][n]);
}

template <int format, int kind, int N>
static void stream_tiles(const Matrix& w, const Output& out, Rows<kind> x, int64_t T, int64_t tile) {
  for (int64_t t = 0; t < T; t += int_block_tokens) switch (T - t) {
      case 1: stream_block<format, kind, 1, N>(w, out, x, t, tile); break;
      case 2: stream_block<format, kind, 2, N>(w, out, x, t, tile); break;
      case 3: stream_block<format, kind, 3, N>(w, out, x, t, tile); break;
      default: stream_block<format, kind, 4, N>(w, out, x, t, tile);
    }
}

// ---- many tokens: blocks of K within a super-panel of tiles within a block of tokens. Accumulators wait in scratch
// between blocks of K, so each output still sees its groups in order.
constexpr int panel_tiles = registers == 32 ? 3 : 1;  // 4 x 3 int32 and 4 x 3 float accumulators
constexpr int64_t panel_groups = 16;                  // 3 x 16 x 576 B of weights stay in L1
constexpr int64_t super_tiles = 12, super_tokens = 256;

struct LinearScratch {
  alignas(64) uint8_t panel[panel_tiles * panel_groups * 640];
  float acc[super_tokens * super_tiles * 16];
};
constexpr size_t linear_int_scratch_bytes = sizeof(LinearScratch);

template <int format, int kind, int M, int N>
static void panel_block(LinearScratch& s, Rows<kind> x, int64_t t, int64_t column, int64_t g0, int64_t g1) {
  using W = Unpacked<format>;
  F acc[M][N];
  float* sums = s.acc + (t * super_tiles + column) * 16;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = g0 == 0 ? zero() : load(sums + (m * super_tiles + n) * 16);
  accumulate<W, kind, M, N, false>(acc, s.panel, panel_groups * W::bytes, x.from(t), g0, g1);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(sums + (m * super_tiles + n) * 16, acc[m][n]);
}

template <int format, int kind, int N>
static void panel_tokens(LinearScratch& s, const uint8_t* w, Rows<kind> x, int64_t T, int64_t column, int64_t g0, int64_t g1) {
  using P = Packed<format>;
  using W = Unpacked<format>;
  for (int n = 0; n < N; ++n)
    for (int64_t g = g0; g < g1; ++g)
      W::unpack(w + n * (x.width / 32 * P::bytes) + g * P::bytes, s.panel + (n * panel_groups + g - g0) * W::bytes);
  for (int64_t t = 0; t < T; t += int_block_tokens) switch (T - t) {
      case 1: panel_block<format, kind, 1, N>(s, x, t, column, g0, g1); break;
      case 2: panel_block<format, kind, 2, N>(s, x, t, column, g0, g1); break;
      case 3: panel_block<format, kind, 3, N>(s, x, t, column, g0, g1); break;
      default: panel_block<format, kind, 4, N>(s, x, t, column, g0, g1);
    }
}

template <int format, int kind>
static void panels(LinearScratch& s, const Matrix& w, const Output& out, Rows<kind> x, int64_t T, int64_t begin, int64_t end) {
  const int64_t groups = x.width / 32, row_bytes = groups * Packed<format>::bytes;
  for (int64_t t0 = 0; t0 < T; t0 += super_tokens)
    for (int64_t tile0 = begin; tile0 < end; tile0 += super_tiles) {
      const int64_t tokens = T - t0 < super_tokens ? T - t0 : super_tokens;
      const int64_t tiles = end - tile0 < super_tiles ? end - tile0 : super_tiles;
      for (int64_t g0 = 0; g0 < groups; g0 += panel_groups) {
        const int64_t g1 = groups - g0 < panel_groups ? groups : g0 + panel_groups;
        int64_t n = 0;
        for (; n + panel_tiles <= tiles; n += panel_tiles)
          panel_tokens<format, kind, panel_tiles>(s, w.data + (tile0 + n) * row_bytes, x.from(t0), tokens, n, g0, g1);
        for (; n < tiles; ++n) panel_tokens<format, kind, 1>(s, w.data + (tile0 + n) * row_bytes, x.from(t0), tokens, n, g0, g1);
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = 0; n < tiles; ++n) finish(out, t0 + t, tile0 + n, load(s.acc + (t * super_tiles + n) * 16));
    }
}

// ---- dispatch
constexpr int64_t stream_max_tokens = 8;

template <int format, int kind>
static void linear_int(const Matrix& w, const Output& out, Rows<kind> x, int64_t T, int64_t begin, int64_t end, uint8_t* scratch) {
  if (T > stream_max_tokens) return panels<format>(*(LinearScratch*)scratch, w, out, x, T, begin, end);
  constexpr int N = registers == 32 ? 2 : 1;
  int64_t tile = begin;
  for (; tile + N <= end; tile += N) stream_tiles<format, kind, N>(w, out, x, T, tile);
  for (; tile < end; ++tile) stream_tiles<format, kind, 1>(w, out, x, T, tile);
}

template <int kind>
static void linear_int(const Matrix& w, const float* bias, const uint8_t* x, int64_t x_stride, int64_t T, int64_t begin, int64_t end,
                       float* y, int64_t y_stride, uint8_t* scratch) {
  const Output out = {bias, y, y_stride, w.rows};
  const Rows<kind> rows = {x, x_stride, padded(w.cols)};
  switch (w.format) {
    case DSO_INT8: return linear_int<DSO_INT8, kind>(w, out, rows, T, begin, end, scratch);
    case DSO_INT4: return linear_int<DSO_INT4, kind>(w, out, rows, T, begin, end, scratch);
    case DSO_Q4_1: return linear_int<DSO_Q4_1, kind>(w, out, rows, T, begin, end, scratch);
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
