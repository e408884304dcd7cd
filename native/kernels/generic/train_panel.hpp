// Panels: the operands of the products of training. A panel has 16 lanes (rows of the left matrix, columns of the right one) by
// a number of steps; a step is 4 bytes of each lane: two bf16 elements of ascending k, or one fp32 element. A panel consists of
// blocks of 16 steps, 1 KB, stored step after step ("steps first": for vectors, and for the right matrix of tile registers) or
// lane after lane (for their left matrix). Lanes and k past the end are zero.
//
// If k is contiguous in memory, a block is read lane by lane, otherwise step by step; a 16 x 16 transposition converts between
// the two.
#pragma once
#include <cstdint>
#include <cstring>

#include "../train_product.hpp"
#include "math.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

constexpr int64_t block_steps = 16, block_bytes = 1024;
constexpr int64_t ahead = 256;  // bytes prefetched ahead: a block has more rows than the hardware prefetchers follow

enum class Numbers { bf16, rounded, fp32 };  // pairs of bf16; fp32 rounded to bf16, without a bf16 product; fp32

constexpr int64_t columns_of_step(Numbers kind) { return kind == Numbers::bf16 ? 2 : 1; }
constexpr int64_t columns_of_block(Numbers kind) { return block_steps * columns_of_step(kind); }

// n elements, at most 16, the rest zero.
template <bool bf16>
DSO_INLINE F read_number(const uint8_t* p, int64_t n) {
  if constexpr (bf16) {
    if (n >= 16) return load_bf16(p);
    alignas(32) uint16_t some[16] = {};
    if (n > 0) memcpy(some, p, 2 * (size_t)n);
    return load_bf16(some);
  } else {
    return n >= 16 ? load((const float*)p) : n > 0 ? load((const float*)p, n) : zero();
  }
}

DSO_INLINE F through_bf16(F x) {
  alignas(32) uint16_t rounded[16];
  round_bf16(rounded, x);
  return load_bf16(rounded);
}

// A block's part of one lane: n elements from p on.
template <Numbers kind, bool bf16>
DSO_INLINE B lane_of(const uint8_t* p, int64_t n) {
  if constexpr (kind != Numbers::bf16) {
    const F x = read_number<bf16>(p, n);
    return bits(kind == Numbers::rounded && !bf16 ? through_bf16(x) : x);
  } else {
    if (bf16 && n >= 32) return load_bytes(p);
    alignas(64) uint16_t some[32] = {};
    if (bf16) {
      memcpy(some, p, 2 * (size_t)n);
    } else {
      round_bf16(some, read_number<bf16>(p, n));
      round_bf16(some + 16, read_number<bf16>(p + 64, n - 16));
    }
    return load_bytes(some);
  }
}

// One step of n lanes, of which k elements exist (at least one); `next`: bytes from one k to the next.
template <Numbers kind, bool bf16>
DSO_INLINE B step_of(const uint8_t* p, int64_t next, int64_t n, int64_t k) {
  if constexpr (kind != Numbers::bf16) {
    const F x = read_number<bf16>(p, n);
    return bits(kind == Numbers::rounded && !bf16 ? through_bf16(x) : x);
  } else {
    if (bf16 && n >= 16 && k > 1) return iadd(load_u16(p), shl<16>(load_u16(p + next)));
    const F x = read_number<bf16>(p, n), y = k > 1 ? read_number<bf16>(p + next, n) : zero();
    return bf16 ? pair_bf16(x, y) : round_pair_bf16(x, y);
  }
}

// The block of `lanes` lanes and `depth` elements each that starts at p; `next`: bytes from one row in memory to the next.
// Missing elements are zero.
template <Numbers kind, bool bf16, bool along, bool lanes_first, bool whole>
static void pack_block(const uint8_t* p, int64_t next, int64_t lanes, int64_t depth, uint8_t* to) {
  constexpr int64_t columns = along ? columns_of_block(kind) : columns_of_step(kind);
  const int64_t n = whole || lanes > 16 ? 16 : lanes,
                k = whole || depth > columns_of_block(kind) ? columns_of_block(kind) : depth;
  B x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    if constexpr (along) {
      if (whole) __builtin_prefetch(p + i * next + ahead);
      x[i] = whole || i < n ? lane_of<kind, bf16>(p + i * next, k) : izero();
    } else {
      if (whole)
        for (int64_t c = 0; c < columns; c++) __builtin_prefetch(p + (i * columns + c) * next + ahead);
      x[i] = whole || i * columns < k ? step_of<kind, bf16>(p + i * columns * next, next, n, k - i * columns) : izero();
    }
  }
  if constexpr (along != lanes_first) transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) store_bytes(to + 64 * i, x[i]);
}

constexpr int64_t blocks_for(Numbers kind, int64_t depth) {
  return (depth + columns_of_block(kind) - 1) / columns_of_block(kind);
}

template <Numbers kind, bool lanes_first, bool bf16, bool along>
static void pack_in_order(const ProductOperand& s, int64_t begin, int64_t end, int64_t k0, int64_t k1, uint8_t* to) {
  constexpr int64_t size = bf16 ? 2 : 4, columns = columns_of_block(kind);
  const int64_t panels = (end - begin + 15) / 16, blocks = blocks_for(kind, k1 - k0), next = s.ld * size;
  const int64_t outer = along ? panels : blocks, inner = along ? blocks : panels;  // along the rows of memory
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++) {
      const int64_t panel = along ? i : j, block = along ? j : i, k = k0 + block * columns, lane = begin + 16 * panel;
      const uint8_t* const p = s.data + (along ? lane * next + k * size : k * next + lane * size);
      uint8_t* const at = to + (panel * blocks + block) * block_bytes;
      if (end - lane >= 16 && k1 - k >= columns)
        pack_block<kind, bf16, along, lanes_first, true>(p, next, 16, columns, at);
      else
        pack_block<kind, bf16, along, lanes_first, false>(p, next, end - lane, k1 - k, at);
    }
}

// Lanes [begin, end) by k in [k0, k1), panel after panel.
template <Numbers kind, bool lanes_first>
static void pack_panels(const ProductOperand& s, int64_t begin, int64_t end, int64_t k0, int64_t k1, uint8_t* to) {
  if (s.bf16)
    s.along ? pack_in_order<kind, lanes_first, true, true>(s, begin, end, k0, k1, to)
            : pack_in_order<kind, lanes_first, true, false>(s, begin, end, k0, k1, to);
  else
    s.along ? pack_in_order<kind, lanes_first, false, true>(s, begin, end, k0, k1, to)
            : pack_in_order<kind, lanes_first, false, false>(s, begin, end, k0, k1, to);
}

// Prefetches part `part` of `parts` of what pack_panels will read, into L2.
static void fetch_lanes(const ProductOperand& s, int64_t begin, int64_t end, int64_t k0, int64_t k1, int64_t part,
                        int64_t parts) {
  const int64_t size = s.bf16 ? 2 : 4, rows = s.along ? end - begin : k1 - k0, bytes = (s.along ? k1 - k0 : end - begin) * size;
  const uint8_t* const p = s.data + (s.along ? begin * s.ld + k0 : k0 * s.ld + begin) * size;
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + row * s.ld * size + at, 0, 2);
}

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
