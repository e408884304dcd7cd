// Blocks as defined in ggml-common.h of llama.cpp. Codes are handled as words of 4 columns, one byte each.
#include "ggml_blocks.hpp"

#include <cstring>

#include "layout.hpp"

namespace dso {
namespace {

constexpr uint32_t kOnes = 0x01010101;

template <int format>
constexpr int groups_of = int_layout(format).superblock ? superblock_groups : 1;  // of 32 columns, in a block

// The numbers of one row of a block.
template <int groups>
struct Block {
  uint32_t codes[groups][8];
  uint8_t scale[groups][2], min[groups][2];  // in superblocks and MXFP4, by half of a group
  uint16_t d, dmin;                          // fp16; without superblocks the scale and the minimum themselves
};
using Superblock = Block<superblock_groups>;

uint16_t half(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, sizeof h);
  return h;
}
uint16_t negated(uint16_t h) { return uint16_t(h ^ 0x8000); }

template <int count>
struct Words {
  uint32_t at[count];
  explicit Words(const uint8_t* p) { memcpy(at, p, sizeof at); }
};

// Bits [shift, shift + bits) of each byte.
uint32_t field(uint32_t word, int bits, int shift) { return word >> shift & kOnes * ((1u << bits) - 1); }

// `run` words of bytes hold the first 4 * run columns in their low nibbles and the next in their high ones.
template <int run, int groups>
void nibbles(const uint8_t* p, Block<groups>& b) {
  uint32_t* codes = b.codes[0];
  for (int chunk = 0; chunk < groups * 8 / (2 * run); ++chunk, p += 4 * run) {
    const Words<run> words(p);
    for (int shift : {0, 4})
      for (uint32_t word : words.at) *codes++ = field(word, 4, shift);
  }
}

// Adds bit planes above the codes: of each 32 bytes, field i belongs to group i; `count` groups.
template <int bits>
void add_planes(const uint8_t* p, int shift, int count, Superblock& b, int first = 0) {
  const Words<8> words(p);
  for (int i = 0; i < count; ++i)
    for (int q = 0; q < 8; ++q) b.codes[first + i][q] |= field(words.at[q], bits, bits * i) << shift;
}

void fifth_bits(const uint8_t* p, Block<1>& b) {  // bit i: column i
  for (int q = 0; q < 8; ++q) {
    const uint32_t four = uint32_t(p[q / 2] >> 4 * (q % 2) & 15);
    b.codes[0][q] |= (four & 1) << 4 | (four & 2) << 11 | (four & 4) << 18 | (four & 8) << 25;
  }
}

void six_bit_scales(const uint8_t* p, Superblock& b) {  // Q4_K and Q5_K
  for (int g = 0; g < 8; ++g) {
    const uint8_t *scale = p + g % 4, *min = p + 4 + g % 4, both = p[8 + g % 4];
    b.scale[g][0] = g < 4 ? *scale & 63 : uint8_t((both & 15) | (*scale >> 2 & 48));
    b.min[g][0] = g < 4 ? *min & 63 : uint8_t(both >> 4 | (*min >> 2 & 48));
  }
}

void clear(Superblock& b) { memset(b.codes, 0, sizeof b.codes); }

template <int format>
void read(const uint8_t* p, Block<groups_of<format>>& b) {
  if constexpr (format == DSO_INT8) {
    const Words<8> words(p + 2);
    for (int q = 0; q < 8; ++q) b.codes[0][q] = words.at[q] ^ 0x80808080;
    b.d = half(p);
  } else if constexpr (format == DSO_INT4 || format == DSO_IQ4_NL) {
    nibbles<4>(p + 2, b);
    b.d = half(p);
  } else if constexpr (format == DSO_MXFP4) {
    nibbles<4>(p + 1, b);
    b.scale[0][0] = p[0];
  } else if constexpr (format == DSO_Q4_1) {
    nibbles<4>(p + 4, b);
    b.d = half(p), b.dmin = half(p + 2);
  } else if constexpr (format == DSO_Q5_0) {
    nibbles<4>(p + 6, b);
    fifth_bits(p + 2, b);
    b.d = half(p);
  } else if constexpr (format == DSO_Q5_1) {
    nibbles<4>(p + 8, b);
    fifth_bits(p + 4, b);
    b.d = half(p), b.dmin = half(p + 2);
  } else if constexpr (format == DSO_Q2_K) {  // uint8 scales[16], qs[64]; fp16 d, dmin
    clear(b);
    for (int part : {0, 1}) add_planes<2>(p + 16 + 32 * part, 0, 4, b, 4 * part);
    for (int i = 0; i < 16; ++i) b.scale[i / 2][i % 2] = p[i];
    b.d = half(p + 80), b.dmin = negated(half(p + 82));
  } else if constexpr (format == DSO_Q3_K) {  // uint8 hmask[32], qs[64], scales[12]; fp16 d
    clear(b);
    for (int part : {0, 1}) add_planes<2>(p + 32 + 32 * part, 0, 4, b, 4 * part);
    add_planes<1>(p, 2, 8, b);
    for (int i = 0; i < 16; ++i) {
      const int low = p[96 + i % 8] >> (i < 8 ? 0 : 4) & 15, high = p[104 + i % 4] >> 2 * (i / 4) & 3;
      b.scale[i / 2][i % 2] = uint8_t((low | high << 4) - 32);
    }
    b.d = half(p + 108);
  } else if constexpr (format == DSO_Q4_K) {  // fp16 d, dmin; uint8 scales[12], qs[128]
    nibbles<8>(p + 16, b);
    six_bit_scales(p + 4, b);
    b.d = half(p), b.dmin = negated(half(p + 2));
  } else if constexpr (format == DSO_Q5_K) {  // fp16 d, dmin; uint8 scales[12], qh[32], qs[128]
    nibbles<8>(p + 48, b);
    add_planes<1>(p + 16, 4, 8, b);
    six_bit_scales(p + 4, b);
    b.d = half(p), b.dmin = negated(half(p + 2));
  } else if constexpr (format == DSO_Q6_K) {  // uint8 ql[128], qh[64]; int8 scales[16]; fp16 d
    nibbles<16>(p, b);
    for (int part : {0, 1}) add_planes<2>(p + 128 + 32 * part, 4, 4, b, 4 * part);
    for (int i = 0; i < 16; ++i) b.scale[i / 2][i % 2] = p[192 + i];
    b.d = half(p + 208);
  } else if constexpr (format == DSO_IQ4_XS) {  // fp16 d; uint16 scales_h; uint8 scales_l[4], qs[128]
    nibbles<4>(p + 8, b);
    const int high = half(p + 2);
    for (int g = 0; g < 8; ++g) b.scale[g][0] = uint8_t(((p[4 + g / 2] >> 4 * (g % 2) & 15) | (high >> 2 * g & 3) << 4) - 32);
    b.d = half(p);
  }
}

template <int format>
constexpr Block<groups_of<format>> empty() {  // of rows past the end
  Block<groups_of<format>> b = {};
  for (auto& group : b.codes)
    for (uint32_t& word : group) word = kOnes * uint32_t(has_table(format) ? 0 : code_offset(format));
  return b;
}

// Words of a plane: each joins the fields of 8 / bits quads, which are shifted right by `shift` first.
template <int bits>
void write_plane(const uint32_t (&codes)[8], int shift, int row, uint8_t* plane) {
  constexpr int per_vector = 8 / bits;
  for (int v = 0; v < bits; ++v) {
    uint32_t word = 0;
    for (int i = 0; i < per_vector; ++i) word |= field(codes[per_vector * v + i], bits, shift) << bits * i;
    memcpy(plane + 64 * v + 4 * row, &word, sizeof word);
  }
}
template <>
void write_plane<8>(const uint32_t (&codes)[8], int, int row, uint8_t* plane) {
  for (int v = 0; v < 8; ++v) memcpy(plane + 64 * v + 4 * row, &codes[v], sizeof codes[v]);
}

template <int format>
void write(const Block<groups_of<format>>& b, int row, uint8_t* tile) {
  constexpr IntLayout layout = int_layout(format);
  for (int g = 0; g < groups_of<format>; ++g) {
    uint8_t* group = tile + group_at(layout, g);
    write_plane<layout.low>(b.codes[g], 0, row, group);
    if constexpr (layout.high) write_plane<layout.high>(b.codes[g], layout.low, row, group + 64 * layout.low);
    uint8_t* numbers = group + code_bytes(layout);
    for (int h = 0; (layout.superblock || layout.powers) && h < layout.halves; ++h) {
      numbers[16 * h + row] = b.scale[g][h];
      if (layout.has_min && !layout.joined) numbers[16 * (layout.halves + h) + row] = b.min[g][h];
    }
  }
  if (layout.powers) return;
  uint8_t* halves = layout.superblock ? tile : tile + code_bytes(layout);
  memcpy(halves + 2 * row, &b.d, sizeof b.d);
  if (layout.has_min) memcpy(halves + 32 + 2 * row, &b.dmin, sizeof b.dmin);
}

template <int format>
void repack(const uint8_t* source, int64_t rows, int64_t cols, int64_t stride, uint8_t* packed) {
  const GgmlBlock block = ggml_block(format);
  constexpr Block<groups_of<format>> none = empty<format>();
  const int64_t bytes = block.cols / kTileCols * tile_bytes(format);
  for (int64_t i = 0; i < cols / block.cols; ++i, packed += bytes)
    for (int r = 0; r < kTileRows; ++r) {
      Block<groups_of<format>> b;
      if (r < rows) read<format>(source + r * stride + i * block.bytes, b);
      write<format>(r < rows ? b : none, r, packed);
    }
}

}  // namespace

GgmlBlock ggml_block(int32_t format) {
  switch (format) {
    case DSO_INT8:
      return {32, 34};
    case DSO_INT4:
    case DSO_IQ4_NL:
      return {32, 18};
    case DSO_Q4_1:
      return {32, 20};
    case DSO_Q5_0:
      return {32, 22};
    case DSO_Q5_1:
      return {32, 24};
    case DSO_MXFP4:
      return {32, 17};
    case DSO_Q2_K:
      return {256, 84};
    case DSO_Q3_K:
      return {256, 110};
    case DSO_Q4_K:
      return {256, 144};
    case DSO_Q5_K:
      return {256, 176};
    case DSO_Q6_K:
      return {256, 210};
    case DSO_IQ4_XS:
      return {256, 136};
    default:
      return {0, 0};
  }
}

void repack_tile_row(int32_t format, const uint8_t* source, int64_t rows, int64_t cols, int64_t stride, int64_t tile,
                     uint8_t* packed) {
  const int64_t first = tile * kTileRows;
  source += first * stride;
  packed += tile * (cols / kTileCols) * tile_bytes(format);
  switch (format) {
    case DSO_INT8:
      return repack<DSO_INT8>(source, rows - first, cols, stride, packed);
    case DSO_INT4:
      return repack<DSO_INT4>(source, rows - first, cols, stride, packed);
    case DSO_Q4_1:
      return repack<DSO_Q4_1>(source, rows - first, cols, stride, packed);
    case DSO_Q2_K:
      return repack<DSO_Q2_K>(source, rows - first, cols, stride, packed);
    case DSO_Q3_K:
      return repack<DSO_Q3_K>(source, rows - first, cols, stride, packed);
    case DSO_Q4_K:
      return repack<DSO_Q4_K>(source, rows - first, cols, stride, packed);
    case DSO_Q5_K:
      return repack<DSO_Q5_K>(source, rows - first, cols, stride, packed);
    case DSO_Q6_K:
      return repack<DSO_Q6_K>(source, rows - first, cols, stride, packed);
    case DSO_IQ4_XS:
      return repack<DSO_IQ4_XS>(source, rows - first, cols, stride, packed);
    case DSO_IQ4_NL:
      return repack<DSO_IQ4_NL>(source, rows - first, cols, stride, packed);
    case DSO_Q5_0:
      return repack<DSO_Q5_0>(source, rows - first, cols, stride, packed);
    case DSO_Q5_1:
      return repack<DSO_Q5_1>(source, rows - first, cols, stride, packed);
    case DSO_MXFP4:
      return repack<DSO_MXFP4>(source, rows - first, cols, stride, packed);
  }
}

}  // namespace dso
