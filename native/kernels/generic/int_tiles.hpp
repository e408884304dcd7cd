// Tiles of integer weights (dso.h, tile_bytes.hpp): packed, or unpacked to one byte per weight and fp32 scales for matrix
// units. A kernel reads the codes of 4 columns x 16 rows by quad(), and the scales of a group by scale() and min().
#pragma once
#include "../tile_bytes.hpp"
#include "trellis.hpp"

namespace dso::DSO_ISA_NAMESPACE {

template <int format>
struct Format {
  static constexpr IntLayout layout = int_layout(format);
  static constexpr bool has_min = layout.has_min;
  static constexpr int halves = layout.halves;
  static constexpr bool joins = layout.split && !layout.nested;  // codes of two planes of 4 bits
  static constexpr int32_t offset = code_offset(format);         // value = stored - offset
  static constexpr int32_t largest =                             // of the stored values
      format == DSO_MXFP4 ? 24
      : layout.trellis    ? 63
      : has_table(format) ? 255
                          : (1 << (layout.low + layout.high + 4 * joins)) - 1;
  // What the products of the stored values are already reduced by, see dot_u8 in the lanes.
  static constexpr int32_t dot_bias = largest > 127 ? DSO_ISA_NAMESPACE::dot_bias : 0;
};

// 4 columns of a plane of `bits` bits, as the bits from `to` on of bytes.
template <int bits>
DSO_INLINE B from_plane(const uint8_t* plane, int quad, int to) {
  constexpr int per_vector = 8 / bits;
  const B b = load_bytes(plane + 64 * (quad / per_vector));
  if constexpr (bits == 8)
    return b;
  else
    return move_bits(b, bits * (quad % per_vector), to, bits);
}

template <int format>
struct Packed : Format<format> {
  using Base = Format<format>;
  static constexpr IntLayout layout = Base::layout;
  static constexpr int64_t bytes = group_bytes(layout);  // from one group to the next within a superblock

  // Where a group's data are; `head`: that of its superblock, or its plane at the end of the tile row.
  struct Place {
    const uint8_t *group, *head;
    Place rows_below(int64_t bytes) const { return {group + bytes, head + bytes}; }
  };
  DSO_INLINE Place place(const uint8_t* row, int64_t g, int64_t groups) {
    constexpr IntLayout l = layout;  // of which no symbol remains, as one does of a static member that a call reads at run time
    return {row + group_at(l, g), row + head_at(l, g, groups)};
  }

  DSO_INLINE B quad(Place at, int q) {
    if constexpr (layout.trellis) return trellis_quad(at.group, q);
    if constexpr (Base::joins) return join_bits(from_plane<4>(at.group, q, 4), from_plane<4>(at.head, q, 0));
    const B low = from_plane<layout.low>(at.group, q, 0);
    if constexpr (has_table(format))
      return look_up(table_of<format>, low);
    else if constexpr (layout.high)
      return join_bits(low, from_plane<layout.high>(at.group + 64 * layout.low, q, layout.low));
    else
      return low;
  }
  template <int half>
  DSO_INLINE F scale(Place at) {
    const uint8_t* numbers = at.group + code_bytes(layout) + 16 * half;
    if constexpr (layout.powers)
      return load_e8(numbers);
    else if constexpr (layout.trellis)
      return load_e5m3(numbers);
    else if constexpr (Base::joins)
      return mul(load_f16(numbers), set(1.0f / 16));  // exact
    else if constexpr (!layout.superblock)
      return load_f16(numbers);
    else if constexpr (layout.joined)
      return mul(load_f16(at.head), to_float(move_bits(load_u8(numbers), 0, 0, 4)));
    else
      return mul(load_f16(at.head), to_float(load_i8(numbers)));
  }
  template <int half>
  DSO_INLINE F min(Place at) {
    const uint8_t* numbers = at.group + code_bytes(layout) + 16 * half;
    if constexpr (!layout.superblock)
      return load_f16(numbers + 32);
    else if constexpr (layout.joined)
      return mul(load_f16(at.head + 32), to_float(sar<4>(load_u8(numbers))));
    else
      return mul(load_f16(at.head + 32), to_float(load_i8(numbers + 16 * layout.halves)));
  }
};

template <int format>
struct Unpacked : Format<format> {  // with one scale per group
  using Base = Format<format>;
  using P = Packed<format>;
  static_assert(Base::halves == 1);
  static constexpr int64_t bytes = 512 + (Base::has_min ? 128 : 64);
  struct Place {
    const uint8_t* group;
    Place rows_below(int64_t bytes) const { return {group + bytes}; }
  };
  DSO_INLINE Place place(const uint8_t* tiles, int64_t g) { return {tiles + g * bytes}; }
  DSO_INLINE B quad(Place at, int q) { return load_bytes(at.group + 64 * q); }
  DSO_INLINE F scale(const uint8_t* tile) { return load((const float*)(tile + 512)); }
  DSO_INLINE F min(const uint8_t* tile) { return load((const float*)(tile + 576)); }
  template <int half>
  DSO_INLINE F scale(Place at) {
    return scale(at.group);
  }
  template <int half>
  DSO_INLINE F min(Place at) {
    return min(at.group);
  }

  DSO_INLINE void unpack(typename P::Place from, uint8_t* tile) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) store_bytes(tile + 64 * q, P::quad(from, q));
    store((float*)(tile + 512), P::template scale<0>(from));
    if constexpr (Base::has_min) store((float*)(tile + 576), P::template min<0>(from));
  }
};
}  // namespace dso::DSO_ISA_NAMESPACE
