// The product of attention: rows of queries or weights times panels of 32 columns of the cache (kv.hpp), for each form in which
// a panel is read.
#pragma once
#include "kv.hpp"

namespace dso::DSO_ISA_NAMESPACE {

enum class Read { f32, bf16, i8, i4, dot, i8_dot, i4_dot };  // how a panel is read: as fp32, or as BF16 by dot_bf16

template <Read T>
constexpr bool narrow = T == Read::dot || T == Read::i8_dot || T == Read::i4_dot;  // q and weights are bf16
template <Read T>
constexpr bool transformed = T == Read::i4 || T == Read::i4_dot;  // q and output too
template <Read T>
constexpr int row_depth = T == Read::bf16 || T == Read::i4 || narrow<T> ? 2 : 1;
template <Read T>
constexpr int64_t row_bytes = T == Read::i8 || transformed<T> ? 32
                              : T == Read::i8_dot             ? 64
                                                              : 128;  // bytes of a panel's row, or pair of rows
template <Read T>
constexpr int64_t column_bytes = T == Read::i8 || T == Read::i8_dot || transformed<T> ? 1 : 4;
constexpr int tile_cols = registers >= 32 ? 2 : 1;  // registers of 16 columns in a tile
constexpr int tile_rows = registers >= 32 ? 8 : 4;
constexpr int64_t chunk_blocks = attn_chunk / block_tokens;
// Elements from one row of a tile, of queries or of weights, to the next; not a power of two.
constexpr int64_t row_stride = (max_head_dim > attn_chunk ? max_head_dim : attn_chunk) + 16;
constexpr int64_t look_ahead_pieces = 6;  // 12 KB with BF16: the fastest of 2 to 24 as measured
constexpr float log2e = 1.44269504f;

DSO_INLINE float minus_infinity() { return -__builtin_inff(); }

// Number of panels that a tile of R rows processes at once: few rows alone have too few sums to keep the ports busy.
template <int R>
constexpr int panels_at_once = 4 * R <= tile_rows   ? 4
                               : 2 * R <= tile_rows ? 2
                                                    : 1;

// acc[p][r] += a[r] * panel[p], over `rows` of the panels (pairs of rows for BF16). A row of `a` has row_stride floats, or bf16
// elements for dot. Prefetches the lines ahead[p] bytes further, row by row.
template <Read T, int R, int P>
DSO_INLINE void product(const void* a, const uint8_t* const (&panel)[P], int64_t rows, const int64_t (&ahead)[P],
                        F (&acc)[P][R][tile_cols]) {
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint8_t* at = panel[p] + i * row_bytes<T>;
      __builtin_prefetch(at + ahead[p]);
      if constexpr (tile_cols == 2 && row_bytes<T> == 128) __builtin_prefetch(at + ahead[p] + 64);
      if constexpr (narrow<T>) {
        B b[tile_cols];
#pragma GCC unroll 2
        for (int n = 0; n < tile_cols; ++n) {
          if constexpr (T == Read::dot)
            b[n] = load_bytes(at + 64 * n);
          else if constexpr (T == Read::i4_dot)
            b[n] = look_up_pairs(int4_values.bf16, at + 16 * n);
          else
            b[n] = pair_bf16(to_float(load_i8(at + 16 * n)), to_float(load_i8(at + 32 + 16 * n)));  // exact
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const B x = broadcast4((const uint16_t*)a + r * row_stride + 2 * i);
#pragma GCC unroll 2
          for (int n = 0; n < tile_cols; ++n) acc[p][r][n] = dot_bf16(acc[p][r][n], b[n], x);
        }
      } else if constexpr (T == Read::bf16 || T == Read::i4) {
        F even[tile_cols], odd[tile_cols];
#pragma GCC unroll 2
        for (int n = 0; n < tile_cols; ++n) {
          if constexpr (T == Read::i4) {
            I low, high;
            look_up_halves(int4_values.numbers, at + 16 * n, low, high);
            even[n] = to_float(low);
            odd[n] = to_float(high);
          } else {
            const B b = load_bytes(at + 64 * n);
            even[n] = even_bf16(b);
            odd[n] = odd_bf16(b);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const float* x = (const float*)a + r * row_stride + 2 * i;
          const F x0 = set(x[0]), x1 = set(x[1]);
#pragma GCC unroll 2
          for (int n = 0; n < tile_cols; ++n) acc[p][r][n] = fma(x1, odd[n], fma(x0, even[n], acc[p][r][n]));
        }
      } else {
        F b[tile_cols];
#pragma GCC unroll 2
        for (int n = 0; n < tile_cols; ++n) {
          if constexpr (T == Read::i8)
            b[n] = to_float(load_i8(at + 16 * n));
          else
            b[n] = load((const float*)at + 16 * n);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const F x = set(((const float*)a)[r * row_stride + i]);
#pragma GCC unroll 2
          for (int n = 0; n < tile_cols; ++n) acc[p][r][n] = fma(x, b[n], acc[p][r][n]);
        }
      }
    }
  }
}
template <Read T, int R>
DSO_INLINE void product(const void* a, const uint8_t* panel, int64_t rows, int64_t ahead, F (&acc)[1][R][tile_cols]) {
  const uint8_t* const panels[] = {panel};
  const int64_t distances[] = {ahead};
  product<T, R, 1>(a, panels, rows, distances, acc);
}

// Calls `call` for n items, P at a time and the rest in smaller groups: with the first item and a type whose `count` is the
// group's size.
template <int N>
struct Count {
  static constexpr int count = N;
};
template <int P, class Call>
DSO_INLINE void by_several(int64_t n, Call call, int64_t first = 0) {
  for (; first + P <= n; first += P) call(first, Count<P>{});
  if constexpr (P > 1) by_several<P / 2>(n, call, first);
}
}  // namespace dso::DSO_ISA_NAMESPACE
