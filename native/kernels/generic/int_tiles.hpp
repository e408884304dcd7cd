// Tiles of integer weights (INT8, INT4, Q4_1; dso.h): packed, or unpacked to one byte per weight and fp32 scales for matrix
// units. A kernel reads either through read(), scale() and min().
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

template <int format>
struct Format {
  static constexpr bool nibbles = format != DSO_INT8;
  static constexpr bool has_min = format == DSO_Q4_1;
  static constexpr int32_t offset = format == DSO_INT8 ? 128 : format == DSO_INT4 ? 8 : 0;  // stored = w + offset
  static constexpr int64_t code_bytes = nibbles ? 256 : 512;
};

// `quads` vectors per read, each 4 columns x 16 rows.
template <int format>
struct Packed : Format<format> {
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

template <int format>
struct Unpacked : Format<format> {
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
}  // namespace dso::DSO_ISA_NAMESPACE
