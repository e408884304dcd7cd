// Layouts of the tiles of packed matrices, see dso.h: for the kernels of every ISA and for the runtime. Internal linkage, so
// that no copy compiled for one ISA can be the one that the linker keeps for all.
#pragma once
#include "dso.h"

namespace dso {

constexpr int64_t superblock_groups = 8;  // groups of 32 columns in a superblock

// Integer formats. A group of 32 columns x 16 rows is a plane of the codes' low bits, a plane of their high bits, scales, and
// minimums. A plane of b bits has b vectors of 64 bytes; byte (r, c) of vector v holds, at bit b * i, column 4 * (8 / b * v +
// i) + c of row r.
struct IntLayout {
  int low, high;         // bits of a code in either plane; low 0: not an integer format
  int halves;            // scales per 32 columns: 1 or 2
  bool has_min;          // W = scale * value + min
  bool superblock;       // scales are bytes, multiplied by an fp16 number of the superblock; otherwise they are fp16
  bool joined;           // a scale and a minimum of 4 bits share a byte
  bool powers = false;   // a scale is 2^(byte - 128)
  bool trellis = false;  // the high plane is a path, see generic/trellis.hpp; a scale is the fp16 number with bits byte << 7
  // A tile row ends with a plane of 4 bits for each of its groups, which `nested` formats leave out: their codes are the upper
  // 4 bits of those of the format that reads both.
  bool split = false, nested = false;
};

static constexpr int64_t code_bytes(IntLayout l) { return 64 * (l.low + l.high); }
static constexpr int64_t scale_bytes(IntLayout l) {  // of one group
  if (l.powers || l.trellis) return 16;
  return l.superblock ? 16 * l.halves * (l.has_min && !l.joined ? 2 : 1) : 32 * (l.has_min ? 2 : 1);
}
static constexpr int64_t group_bytes(IntLayout l) { return code_bytes(l) + scale_bytes(l); }
static constexpr int64_t split_bytes(IntLayout l) { return l.split ? 256 : 0; }  // of a group, at the end of the tile row
// A superblock begins with its head: fp16 d[16], dmin[16]
static constexpr int64_t head_bytes(IntLayout l) { return l.superblock ? 32 * (l.has_min ? 2 : 1) : 0; }
// Where a group, and the head of its superblock, begin in a tile row of `groups` groups; of a split format, where the group's
// plane at the end begins.
static constexpr int64_t head_at(IntLayout l, int64_t group, int64_t groups) {
  if (l.split) return groups * group_bytes(l) + group * split_bytes(l);
  return l.superblock ? group / superblock_groups * (head_bytes(l) + superblock_groups * group_bytes(l)) : 0;
}
static constexpr int64_t group_at(IntLayout l, int64_t group) {
  return l.superblock ? head_at(l, group, 0) + head_bytes(l) + group % superblock_groups * group_bytes(l)
                      : group * group_bytes(l);
}

static constexpr IntLayout int_layout(int32_t format) {
  switch (format) {
    case DSO_INT8:
      return {8, 0, 1, false, false, false};
    case DSO_INT4:
    case DSO_IQ4_NL:
      return {4, 0, 1, false, false, false};
    case DSO_Q4_1:
      return {4, 0, 1, true, false, false};
    case DSO_Q5_0:
      return {4, 1, 1, false, false, false};
    case DSO_Q5_1:
      return {4, 1, 1, true, false, false};
    case DSO_Q2_K:
      return {2, 0, 2, true, true, true};
    case DSO_Q3_K:
      return {2, 1, 2, false, true, false};
    case DSO_Q4_K:
      return {4, 0, 1, true, true, false};
    case DSO_Q5_K:
      return {4, 1, 1, true, true, false};
    case DSO_Q6_K:
      return {4, 2, 2, false, true, false};
    case DSO_IQ4_XS:
      return {4, 0, 1, false, true, false};
    case DSO_MXFP4:
      return {4, 0, 1, false, false, false, true};
    case DSO_INT3:
      return {2, 1, 1, false, false, false, false, true};
    case DSO_INT8_NESTED:
      return {4, 0, 1, false, false, false, false, false, true, false};
    case DSO_INT4_NESTED:
      return {4, 0, 1, false, false, false, false, false, true, true};
    default:
      return {0, 0, 0, false, false, false};
  }
}

// The value of a code is code - code_offset, or in formats with a table its entry - code_offset.
static constexpr int32_t code_offset(int32_t format) {
  switch (format) {
    case DSO_INT8:
    case DSO_IQ4_NL:
    case DSO_IQ4_XS:
      return 128;
    case DSO_INT4:
    case DSO_INT4_NESTED:
      return 8;
    case DSO_INT8_NESTED:
      return 136;
    case DSO_MXFP4:
      return 12;
    case DSO_Q3_K:
      return 4;
    case DSO_Q5_0:
      return 16;
    case DSO_INT3:
    case DSO_Q6_K:
      return 32;
    default:
      return 0;
  }
}

// Where a tile of FP8 has the code of W[r, k], r < 16, k < 32.
static constexpr int64_t fp8_at(int64_t r, int64_t k) { return (k / 4 * 16 + r) * 4 + k % 2 * 2 + k / 2 % 2; }

static constexpr bool has_table(int32_t format) { return format == DSO_IQ4_NL || format == DSO_IQ4_XS || format == DSO_MXFP4; }
// kvalues_mxfp4 of ggml + 12, and kvalues_iq4nl + 128
static constexpr uint8_t mxfp4_values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
static constexpr uint8_t iq4_values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
static constexpr int trellis_shifts[2] = {-1, 3};  // of INT3's path, see SHIFTS in quant/trellis.py
// INT3's values + 32, by 4 u + subset and by u + 4 subset
static constexpr uint8_t trellis_values[16] = {1, 8, 14, 19, 23, 26, 28, 31, 33, 36, 38, 41, 45, 50, 56, 63};
static constexpr uint8_t trellis_values_transposed[16] = {1, 23, 33, 45, 8, 26, 36, 50, 14, 28, 38, 56, 19, 31, 41, 63};
template <int32_t format>
static constexpr const uint8_t (&table_of)[16] = format == DSO_MXFP4 ? mxfp4_values : iq4_values;

static constexpr int64_t tile_bytes(int32_t format) {  // -1: not a packed format
  switch (format) {
    case DSO_F32:
      return 2048;
    case DSO_BF16:
      return 1024;
    case DSO_FP8:
      return 544;
    default:
      const IntLayout layout = int_layout(format);
      return layout.low ? group_bytes(layout) + split_bytes(layout) + head_bytes(layout) / superblock_groups : -1;
  }
}

}  // namespace dso
