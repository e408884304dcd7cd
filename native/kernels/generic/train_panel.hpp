// Panels: what the products of training read. 16 lanes (rows of the left matrix, columns of the right one) by so many steps; a step is
// 4 bytes of each lane: two bf16 numbers of k ascending, or one fp32 number. A panel is blocks of 16 steps, 1 KB: step after step
// ("steps first": vectors, and the right matrix of tile registers) or lane after lane (their left matrix). Lanes and k past the end
// are zero.
//
// Where k is the dimension that lies together in memory a block comes lane by lane, otherwise step by step; a transposition of 16 x 16
// makes the one of the other.
#pragma once
#include <cstdint>
#include <cstring>

#include "../train_product.hpp"
#include "math.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

constexpr int64_t block_steps = 16, block_bytes = 1024;

enum class Numbers { bf16, rounded, fp32 };  // pairs of bf16; fp32 that was rounded to bf16, where that has no product; fp32

constexpr int64_t columns_of_step(Numbers kind) { return kind == Numbers::bf16 ? 2 : 1; }
constexpr int64_t columns_of_block(Numbers kind) { return block_steps * columns_of_step(kind); }

// n <= 16 numbers, the rest zero.
DSO_INLINE F read_bf16(const uint8_t* p, int64_t n) {
  if (n >= 16) return load_bf16(p);
  alignas(32) uint16_t some[16] = {};
  if (n > 0) memcpy(some, p, 2 * (size_t)n);
  return load_bf16(some);
}
DSO_INLINE F read_f32(const uint8_t* p, int64_t n) { return n >= 16 ? load((const float*)p) : n > 0 ? load((const float*)p, n) : zero(); }
DSO_INLINE F read_number(const uint8_t* p, bool bf16, int64_t n) { return bf16 ? read_bf16(p, n) : read_f32(p, n); }

DSO_INLINE F through_bf16(F x) {
  alignas(32) uint16_t rounded[16];
  round_bf16(rounded, x);
  return load_bf16(rounded);
}

DSO_INLINE B bytes_of(F x) {
  alignas(64) float some[16];
  store(some, x);
  return load_bytes(some);
}

// A block's part of one lane: n numbers from p on.
template <Numbers kind> DSO_INLINE B lane_of(const uint8_t* p, bool bf16, int64_t n) {
  if constexpr (kind == Numbers::bf16) {
    if (bf16 && n >= 32) return load_bytes(p);
    alignas(64) uint16_t some[32] = {};
    if (bf16) {
      memcpy(some, p, 2 * (size_t)n);
    } else {
      round_bf16(some, read_f32(p, n));
      round_bf16(some + 16, read_f32(p + 64, n - 16));
    }
    return load_bytes(some);
  } else {
    const F x = read_number(p, bf16, n);
    return bytes_of(kind == Numbers::rounded && !bf16 ? through_bf16(x) : x);
  }
}

// One step of n lanes, of which k numbers exist (at least one); `next`: bytes from a k to the next.
template <Numbers kind> DSO_INLINE B step_of(const uint8_t* p, int64_t next, bool bf16, int64_t n, int64_t k) {
  const F x = read_number(p, bf16, n);
  if constexpr (kind == Numbers::bf16) {
    const F y = k > 1 ? read_number(p + next, bf16, n) : zero();
    return bf16 ? pair_bf16(x, y) : round_pair_bf16(x, y);
  } else {
    return bytes_of(kind == Numbers::rounded && !bf16 ? through_bf16(x) : x);
  }
}

// The block of `lanes` lanes from `lane` on and `depth` numbers from k on.
template <Numbers kind, bool lanes_first>
static void pack_block(const ProductOperand& s, int64_t lane, int64_t lanes, int64_t k, int64_t depth, uint8_t* to) {
  const int64_t size = s.bf16 ? 2 : 4, next = s.ld * size;
  B x[16];
  const uint8_t* p = s.data + (s.along ? lane * next + k * size : k * next + lane * size);
  if (s.along) {
    const int64_t n = depth < columns_of_block(kind) ? depth : columns_of_block(kind);
    for (int i = 0; i < 16; i++) x[i] = i < lanes ? lane_of<kind>(p + i * next, s.bf16, n) : bytes_of(zero());
  } else {
    constexpr int64_t columns = columns_of_step(kind);
    for (int i = 0; i < 16; i++)
      x[i] = i * columns < depth ? step_of<kind>(p + i * columns * next, next, s.bf16, lanes < 16 ? lanes : 16, depth - i * columns) : bytes_of(zero());
  }
  if (s.along != lanes_first) transpose(x);
  for (int i = 0; i < 16; i++) store_bytes(to + 64 * i, x[i]);
}

constexpr int64_t blocks_for(Numbers kind, int64_t depth) { return (depth + columns_of_block(kind) - 1) / columns_of_block(kind); }

// Lanes [begin, end) by k in [k0, k1), panel after panel.
template <Numbers kind, bool lanes_first>
static void pack_panels(const ProductOperand& s, int64_t begin, int64_t end, int64_t k0, int64_t k1, uint8_t* to) {
  const int64_t panels = (end - begin + 15) / 16, blocks = blocks_for(kind, k1 - k0);
  const int64_t outer = s.along ? panels : blocks, inner = s.along ? blocks : panels;  // along the rows of memory
  for (int64_t i = 0; i < outer; i++)
    for (int64_t j = 0; j < inner; j++) {
      const int64_t panel = s.along ? i : j, block = s.along ? j : i, k = k0 + block * columns_of_block(kind), lane = begin + 16 * panel;
      pack_block<kind, lanes_first>(s, lane, end - lane, k, k1 - k, to + (panel * blocks + block) * block_bytes);
    }
}

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
