// Products of INT3: codes of 3 bits that choose among 16 values along a path through a trellis (src/deepseek_optimizer/quant/
// trellis.py).
#pragma once
#include "../tile_bytes.hpp"

namespace dso::DSO_ISA_NAMESPACE {

// The values of 4 columns x 16 rows, + code_offset, from a group's planes: two of u, then the path's. The path's plane is 16
// circles of 32 bits, so the bits of other weights are rotations of a lane. What does not depend on `quad` is computed once,
// since the compiler sees all 8 calls.
DSO_INLINE B trellis_quad(const uint8_t* group, int quad) {
  const B path = load_bytes(group + 128), u = load_bytes(group + 64 * (quad / 4));
  const B mixed = xor_bits(rotate<trellis_shifts[0] & 31>(path), rotate<trellis_shifts[1] & 31>(path));
  // Pairs of bits that choose a subset: of even positions, or of odd ones.
  const B pairs = quad % 4 < 2 ? path : mixed;
  const B subset = quad < 4 ? move_bits(pairs, 0, 0, 4) : move_bits(pairs, 4, 0, 4);
  const B low = quad % 4 < 2 ? u : sar<4>(u);
  return quad % 2 ? look_up(trellis_values, select_bits(0x0c, low, subset))
                  : look_up(trellis_values_transposed, select_bits(0x03, low, subset));
}
}  // namespace dso::DSO_ISA_NAMESPACE
