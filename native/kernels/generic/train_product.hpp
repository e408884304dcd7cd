// C = A B (+ bias) (+ C) for operands in any of the layouts of training: y = x W^T, dx = dy W, dW = dy^T x.
//
// After BLIS (Van Zee and van de Geijn, 2015): a block of A is packed, `depth_steps` steps at a time, and stays in L2; a strip
// of B of a few panels is packed, and is multiplied by all panels of the block while it is in L1 and L2. The sums over a depth
// stay in fp32 scratch for the next depth, which does not change the result: every element of C is one chain of fused
// multiply-adds over ascending k (bf16: pairs, as the lanes' dot_bf16 adds them). The bias and the previous content of C are
// added last, and the sum is rounded once.
//
// An Engine multiplies a few panels of A by a strip: vectors here, tile registers in amx/train_tiles.hpp.
#pragma once
#include "train_panel.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

constexpr int64_t depth_steps = 288;  // for a strip of 3 panels: 54 KB, of which L2 refills L1 faster than it is multiplied

// Sums of `rows` x 16 `panels` elements, rows 16 * panels floats apart.
template <Numbers kind>
class Vectors {
 public:
  static constexpr bool lanes_first = false;
  static constexpr int rows = 16, panels = 3;

  // a: a panel; b: a strip whose panels are `b_next` bytes apart. begin: sums start from zero.
  void multiply(const uint8_t* a, [[maybe_unused]] int64_t a_next, const uint8_t* b, int64_t b_next, int64_t steps, int64_t m,
                int64_t n, float* sums, bool begin) {
    constexpr int most = registers >= 32 ? 8 : 6, beside = registers >= 32 ? panels : 1;
    const int64_t pieces = (m + most - 1) / most;
    for (int64_t p = 0; p < n; p += beside)
      for (int64_t piece = 0, row = 0; piece < pieces; piece++) {
        const int64_t next = (piece + 1) * m / pieces;
        some_rows((int)(next - row), (int)(n - p < beside ? n - p : beside), a + 4 * row, b + p * b_next, b_next, steps,
                  sums + row * 16 * panels + 16 * p, begin);
        row = next;
      }
  }

 private:
  static void some_rows(int m, int n, const uint8_t* a, const uint8_t* b, int64_t b_next, int64_t steps, float* sums,
                        bool begin) {
    switch (n) {
      case 1:
        return with_panels<1>(m, a, b, b_next, steps, sums, begin);
      case 2:
        return with_panels<2>(m, a, b, b_next, steps, sums, begin);
      default:
        return with_panels<3>(m, a, b, b_next, steps, sums, begin);
    }
  }

  template <int N>
  static void with_panels(int m, const uint8_t* a, const uint8_t* b, int64_t b_next, int64_t steps, float* sums, bool begin) {
    switch (m) {
      case 1:
        return kernel<1, N>(a, b, b_next, steps, sums, begin);
      case 2:
        return kernel<2, N>(a, b, b_next, steps, sums, begin);
      case 3:
        return kernel<3, N>(a, b, b_next, steps, sums, begin);
      case 4:
        return kernel<4, N>(a, b, b_next, steps, sums, begin);
      case 5:
        return kernel<5, N>(a, b, b_next, steps, sums, begin);
      case 6:
        return kernel<6, N>(a, b, b_next, steps, sums, begin);
      case 7:
        return kernel<7, N>(a, b, b_next, steps, sums, begin);
      default:
        return kernel<8, N>(a, b, b_next, steps, sums, begin);
    }
  }

  template <int M, int N>
  static void kernel(const uint8_t* a, const uint8_t* b, int64_t b_next, int64_t steps, float* sums, bool begin) {
    F acc[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] = begin ? zero() : load(sums + m * 16 * panels + 16 * n);
    }
    for (int64_t s = 0; s < steps; s++, a += 64, b += 64) {
      B right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) right[n] = load_bytes(b + n * b_next);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        if constexpr (kind == Numbers::bf16) {
          const B left = broadcast4(a + 4 * m);
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) acc[m][n] = dot_bf16(acc[m][n], right[n], left);
        } else {
          float value;
          memcpy(&value, a + 4 * m, 4);
          const F left = set(value);
#pragma GCC unroll 8
          for (int n = 0; n < N; n++) acc[m][n] = fma(load((const float*)(b + n * b_next)), left, acc[m][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) store(sums + m * 16 * panels + 16 * n, acc[m][n]);
    }
  }
};

// ---- from sums to C

DSO_INLINE F read_number(const uint8_t* p, bool bf16, int64_t n) {
  return bf16 ? read_number<true>(p, n) : read_number<false>(p, n);
}

DSO_INLINE void write_number(uint8_t* p, bool bf16, F x, int64_t n) {
  if (!bf16) return store_some((float*)p, x, n);
  if (n >= 16) return round_bf16(p, x);
  alignas(32) uint16_t some[16];
  round_bf16(some, x);
  memcpy(p, some, 2 * (size_t)n);
}

// Rows [m, m + rows) and columns [n, n + columns); sums have `stride` floats per row.
static void finish(const ProductResult& c, int64_t m, int64_t rows, int64_t n, int64_t columns, const float* sums,
                   int64_t stride) {
  const int64_t size = c.bf16 ? 2 : 4, bias_size = c.bias_bf16 ? 2 : 4;
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t some = columns - j;
      uint8_t* const p = c.data + ((m + i) * c.ld + n + j) * size;
      F x = load(sums + i * stride + j);
      if (c.bias) x = add(x, read_number(c.bias + (n + j) * bias_size, c.bias_bf16, some));
      if (c.add) x = add(x, read_number(p, c.bf16, some));
      write_number(p, c.bf16, x, some);
    }
  }
}

// Prefetches what `finish` will write, while the sums are computed.
static void fetch(const ProductResult& c, int64_t m, int64_t rows, int64_t n, int64_t columns) {
  const int64_t size = c.bf16 ? 2 : 4;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns * size; j += 64) __builtin_prefetch(c.data + ((m + i) * c.ld + n) * size + j, 1);
}

// ---- a block

struct Shares {  // parts of a thread's scratch
  int64_t left, right, sums;
  int64_t bytes() const { return left + right + sums; }
};

template <class Engine>
constexpr int64_t cell_floats = Engine::rows * 16 * Engine::panels;

// Depth of K packed at a time: equal parts of whole blocks, at least one.
constexpr int64_t depth_for(Numbers kind, int64_t K) {
  const int64_t most = depth_steps * columns_of_step(kind), pieces = K > most ? (K + most - 1) / most : 1;
  return blocks_for(kind, K > 0 ? (K + pieces - 1) / pieces : 1) * columns_of_block(kind);
}

template <Numbers kind, class Engine>
static Shares shares(int64_t rows, int64_t columns, int64_t K) {
  const int64_t panels = (rows + Engine::rows - 1) / Engine::rows * (Engine::rows / 16);
  const int64_t bytes = depth_for(kind, K) / columns_of_step(kind) * 64;  // per panel
  const int64_t cells =
      K > depth_for(kind, K) ? (columns + 16 * Engine::panels - 1) / (16 * Engine::panels) * (panels * 16 / Engine::rows) : 1;
  return {panels * bytes, Engine::panels * bytes, cells * cell_floats<Engine> * 4};
}

template <Numbers kind, class Engine>
static void block_with(const ProductJob& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1, uint8_t* scratch) {
  constexpr int64_t strip = 16 * Engine::panels;
  const int64_t depth = depth_for(kind, job.K);
  const Shares at = shares<kind, Engine>(m1 - m0, n1 - n0, job.K);
  uint8_t *const left = scratch, *const right = left + at.left;
  float* const sums = (float*)(right + at.right);
  const int64_t cells = (m1 - m0 + Engine::rows - 1) / Engine::rows;
  Engine engine;
  for (int64_t k = 0; k == 0 || k < job.K; k += depth) {  // also once if K is 0
    const int64_t end = job.K - k < depth ? job.K : k + depth, panel = blocks_for(kind, end - k) * block_bytes;
    const bool last = end == job.K, parked = job.K > depth;
    for (int64_t n = n0; n < n1; n += strip) {
      const int64_t columns = n1 - n < strip ? n1 - n : strip;
      pack_panels<kind, false>(job.b, n, n + columns, k, end, right);
      for (int64_t cell = 0; cell < cells; cell++) {
        const int64_t m = m0 + cell * Engine::rows, rows = m1 - m < Engine::rows ? m1 - m : Engine::rows;
        // While the first strip is multiplied by one cell of A, the elements of the next cell are fetched from memory, as are
        // those of the next strip.
        if (n == n0) {
          pack_panels<kind, Engine::lanes_first>(job.a, m, m + rows, k, end, left + cell * (Engine::rows / 16) * panel);
          if (cell + 1 < cells)
            fetch_lanes(job.a, m + rows, m1 - m - rows < Engine::rows ? m1 : m + rows + Engine::rows, k, end, 0, 1);
        }
        if (n + strip < n1) fetch_lanes(job.b, n + strip, n1 - n - strip < strip ? n1 : n + 2 * strip, k, end, cell, cells);
        float* const to = parked ? sums + ((n - n0) / strip * cells + cell) * cell_floats<Engine> : sums;
        if (last) fetch(job.c, m, rows, n, columns);
        engine.multiply(left + cell * (Engine::rows / 16) * panel, panel, right, panel,
                        (end - k + columns_of_step(kind) - 1) / columns_of_step(kind), rows, (columns + 15) / 16, to, k == 0);
        if (last) finish(job.c, m, rows, n, columns, to, strip);
      }
    }
  }
}

template <template <Numbers> class Engine>
static void product_block(const ProductJob& job, bool exact, int64_t m0, int64_t m1, int64_t n0, int64_t n1, uint8_t* scratch) {
  if (exact) return block_with<Numbers::fp32, Vectors<Numbers::fp32>>(job, m0, m1, n0, n1, scratch);
  if constexpr (has_dot_bf16)
    block_with<Numbers::bf16, Engine<Numbers::bf16>>(job, m0, m1, n0, n1, scratch);
  else
    block_with<Numbers::rounded, Vectors<Numbers::rounded>>(job, m0, m1, n0, n1, scratch);
}

template <template <Numbers> class Engine>
static int64_t product_scratch(int64_t rows, int64_t columns, int64_t K) {
  const int64_t exact = shares<Numbers::fp32, Vectors<Numbers::fp32>>(rows, columns, K).bytes();
  const int64_t rounded = shares<Numbers::bf16, Engine<Numbers::bf16>>(rows, columns, K).bytes();
  return exact > rounded ? exact : rounded;
}

// ---- the gradient of a bias

static void column_sums(const ProductOperand& x, int64_t T, int64_t n0, int64_t n1, uint8_t* sums, bool bf16,
                        bool to_be_added) {
  constexpr int beside = 4;
  const int64_t size = x.bf16 ? 2 : 4, to = bf16 ? 2 : 4;
  for (int64_t n = n0; n < n1; n += 16 * beside) {
    F acc[beside] = {zero(), zero(), zero(), zero()};
    for (int64_t t = 0; t < T; t++)
      for (int i = 0; i < beside; i++)
        acc[i] = add(acc[i], read_number(x.data + (t * x.ld + n + 16 * i) * size, x.bf16, n1 - n - 16 * i));
    for (int i = 0; i < beside && n + 16 * i < n1; i++) {
      uint8_t* const p = sums + (n + 16 * i) * to;
      const int64_t some = n1 - n - 16 * i;
      write_number(p, bf16, to_be_added ? add(acc[i], read_number(p, bf16, some)) : acc[i], some);
    }
  }
}

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
