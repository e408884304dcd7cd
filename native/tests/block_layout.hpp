// The formats of K-quants, IQ4 and 5-bit blocks in plain scalar code: an independent implementation of dso.h.
#pragma once
#include "check.hpp"

struct BlockFormat {
  int format;
  const char* name;
  int bytes, low, high, columns, offset;  // per tile; bits of the planes; columns per scale
  bool superblock, has_min;

  bool byte_scales() const { return format == DSO_MXFP4 || format == DSO_INT3; }  // and no fp16 numbers
};
constexpr BlockFormat block_formats[] = {
    {DSO_Q2_K, "q2_k", 168, 2, 0, 16, 0, true, true},       {DSO_Q3_K, "q3_k", 228, 2, 1, 16, 4, true, false},
    {DSO_Q4_K, "q4_k", 296, 4, 0, 32, 0, true, true},       {DSO_Q5_K, "q5_k", 360, 4, 1, 32, 0, true, true},
    {DSO_Q6_K, "q6_k", 420, 4, 2, 16, 32, true, false},     {DSO_IQ4_XS, "iq4_xs", 276, 4, 0, 32, 0, true, false},
    {DSO_IQ4_NL, "iq4_nl", 288, 4, 0, 32, 0, false, false}, {DSO_Q5_0, "q5_0", 352, 4, 1, 32, 16, false, false},
    {DSO_Q5_1, "q5_1", 384, 4, 1, 32, 0, false, true},      {DSO_MXFP4, "mxfp4", 272, 4, 0, 32, 0, false, false},
    {DSO_INT3, "int3", 208, 2, 1, 32, 0, false, false},
};
inline const BlockFormat* block_format(int format) {
  for (const BlockFormat& f : block_formats)
    if (f.format == format) return &f;
  return nullptr;
}

inline size_t block_bytes(const BlockFormat& f, int rows, int cols) {
  return (size_t)((rows + 15) / 16) * (size_t)((cols + 31) / 32) * (size_t)f.bytes;
}

struct BlockMatrix {
  const BlockFormat& f;
  uint8_t* data;
  int cols;

  // The start of the superblock that holds W[r, c], or without superblocks of its tile; and of its group.
  size_t start(int r, int c) const {
    const size_t unit = f.superblock ? 8 : 1;
    return ((size_t)(r / 16) * (((size_t)cols + 31) / 32) + (size_t)c / 32 / unit * unit) * (size_t)f.bytes;
  }
  size_t group(int r, int c) const {
    if (!f.superblock) return start(r, c);
    const int head = f.has_min ? 64 : 32;
    return start(r, c) + (size_t)(head + c / 32 % 8 * (8 * f.bytes - head) / 8);
  }
  int plane(const uint8_t* at, int bits, int r, int c) const {
    const int quad = c % 32 / 4, per = 8 / bits;
    return at[quad / per * 64 + r % 16 * 4 + c % 4] >> quad % per * bits & ((1 << bits) - 1);
  }
  int value(int r, int c) const {
    static constexpr int iq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const uint8_t* at = data + group(r, c);
    int code = plane(at, f.low, r, c);
    static constexpr int mxfp4[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    if (f.format == DSO_MXFP4) return mxfp4[code];
    if (f.format == DSO_INT3) return path_value(at, code, r, c);
    if (f.high) code += plane(at + 64 * f.low, f.high, r, c) << f.low;
    return f.format == DSO_IQ4_XS || f.format == DSO_IQ4_NL ? iq4[code] : code - f.offset;
  }
  // INT3: the value of a column, whose 2 bits in the first planes are u.
  static int path_value(const uint8_t* group, int u, int r, int c) {
    static constexpr int values[] = {-31, -24, -18, -13, -9, -6, -4, -1, 1, 4, 6, 9, 13, 18, 24, 31};
    static constexpr int position[] = {2, 0, 3, 1, 6, 4, 7, 5};  // of each 4 columns within a byte of the path
    const int p = 8 * (c % 4) + position[c % 32 / 4];
    const auto bit = [&](int at) { return group[128 + r % 16 * 4 + (at & 31) / 8] >> (at & 7) & 1; };
    const auto mixed = [&](int at) { return bit(at + 1) ^ bit(at - 3); };
    return values[4 * u + (p % 2 ? mixed(p - 1) + 2 * mixed(p) : bit(p) + 2 * bit(p + 1))];
  }
  uint8_t* halves(int r, int c) const {  // the row's fp16 number; the next, if there is one, is 32 bytes further
    return data + (f.superblock ? start(r, c) : start(r, c) + (size_t)(64 * (f.low + f.high))) + 2 * (r % 16);
  }
  float half_at(const uint8_t* p) const { return half_to_float((uint16_t)(p[0] | p[1] << 8)); }
  uint8_t* byte(int r, int c) const {  // of the scale, in superblocks, MXFP4 and INT3
    return data + group(r, c) + 64 * (f.low + f.high) + c % 32 / f.columns * 16 + r % 16;
  }
  float scale(int r, int c) const {
    if (f.format == DSO_MXFP4) return std::ldexp(1.0f, *byte(r, c) - 128);
    if (f.format == DSO_INT3) return half_to_float((uint16_t)(*byte(r, c) << 7));
    const float d = half_at(halves(r, c));
    if (!f.superblock) return d;
    return d * (float)(f.format == DSO_Q2_K ? *byte(r, c) & 15 : (int8_t)*byte(r, c));
  }
  float min(int r, int c) const {
    if (!f.has_min) return 0;
    const float d = half_at(halves(r, c) + 32);
    if (!f.superblock) return d;
    return d * (float)(f.format == DSO_Q2_K ? *byte(r, c) >> 4 : (int8_t)byte(r, c)[16 * 32 / f.columns]);
  }
};
