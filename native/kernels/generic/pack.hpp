// Packs and unpacks weights in all formats of dso.h. The exact rule is in docs/contracts.md; src/deepseek_optimizer/quant/
// defines it in torch.
//
// A tile's 16 rows are transposed, so that a lane is a row: extrema, scales and codes of 16 groups are computed side by side
// without a horizontal step, and four code vectors joined are already the tile's layout.
#pragma once
#include <cstdint>
#include <cstring>

#include "../kernels.hpp"
#include "../tile_bytes.hpp"
#include "dso.h"
#include "pack_search.hpp"
#include "pack_trellis.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace packing {

// ---- reading the source

// 32 columns of one row as floats; columns past the first n are zero and not read.
static inline void read_row(int32_t src_type, const uint8_t* src, int64_t n, float* out) {
  const int64_t size = src_type == DSO_SRC_F32 ? 4 : 2;
  alignas(64) uint8_t part[C * 4];
  if (n < C) {
    memset(part, 0, sizeof part);
    if (n > 0) memcpy(part, src, (size_t)(n * size));
    src = part;
  }
  for (int k = 0; k < C; k += lanes) {
    switch (src_type) {
      case DSO_SRC_F32:
        store(out + k, load((const float*)(src + 4 * k)));
        break;
      case DSO_SRC_BF16:
        store(out + k, load_bf16(src + 2 * k));
        break;
      default:
        store(out + k, load_f16(src + 2 * k));
        break;
    }
  }
}

// rows x cols of 32-bit items, in[rows][cols] -> out[cols][rows]; both multiples of 4. Moves bits of any type.
template <int rows, int cols>
static inline void transpose(const void* in, void* out) {
  const float* a = (const float*)in;
  float* b = (float*)out;
  for (int r = 0; r < rows; r += 4) {
    for (int c = 0; c < cols; c += 4) {
      transpose4<rows, cols>(a, b, r, c);
    }
  }
}

// ---- scales

static inline bool finite16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// The first element with the largest magnitude in row r, where the maximum and the minimum have equal magnitude and opposite
// signs.
static inline float first_of_largest(const float (*t)[R], int r, float magnitude) {
  for (int k = 0; k < C; k++)
    if (t[k][r] == magnitude || t[k][r] == -magnitude) return t[k][r];
  return magnitude;  // not reached: the magnitude is that of one of these
}
static inline F largest_of(const float (*t)[R], F high, F low) {
  alignas(64) float hi[R], lo[R], e[R];
  store(hi, high), store(lo, low);
  for (int r = 0; r < R; r++) e[r] = hi[r] > -lo[r] ? hi[r] : hi[r] < -lo[r] ? lo[r] : first_of_largest(t, r, hi[r]);
  return load(e);
}

// Scales (and minima) of 16 groups, t[column][row], of which n columns exist; written as fp16, and returned as decoding reads
// them, except that a NaN scale is returned as zero. Rows without a usable scale are blanked in t: their codes are the code of
// zero.
template <int format>
static inline Numbers numbers_of(float (*t)[R], int n, const float* importance, uint16_t* scale16, uint16_t* min16) {
  alignas(64) float bad[R], settled[R];
  F hi = load(t[0]), lo = hi, nan = mul(hi, zero());
  for (int k = 1; k < n; k++) {
    const F x = load(t[k]);
    hi = max(hi, x), lo = min(lo, x), nan = fma(x, zero(), nan);  // NaN and infinity times zero are NaN
  }
  store(bad, nan);
  [[maybe_unused]] F largest = zero();
  Numbers found;
  if constexpr (format == DSO_INT8) found = {as_f16(div(max(hi, sub(zero(), lo)), set(127))), zero()};
  if constexpr (format == DSO_INT4) largest = largest_of(t, hi, lo), found = first_int4(largest);
  if constexpr (format == DSO_Q4_1) found = first_q4_1(lo, hi);
  if constexpr (format == DSO_INT8_NESTED) found = nested_scale(lo, hi);
  auto write = [&] {
    alignas(64) float scale[R], least[R];
    store(scale, found.scale), store(least, found.least);
    to_f16(scale, scale16), to_f16(least, min16);
  };
  write();
  bool blank[R];
  for (int r = 0; r < R; r++) {
    blank[r] = bad[r] != bad[r] || !finite16(scale16[r]) || !finite16(min16[r]);
    settled[r] = blank[r] || (scale16[r] & 0x7fff) == 0 ? 0.0f : -1.0f;
    for (int k = 0; blank[r] && k < C; k++) t[k][r] = 0;
  }
  if constexpr (format == DSO_INT4) found = search_int4({t, n, importance}, found, load(settled), largest);
  if constexpr (format == DSO_Q4_1) found = search_q4_1({t, n, importance}, found, load(settled), lo, hi);
  write();
  for (int r = 0; r < R; r++) {
    if (blank[r]) scale16[r] = 0, min16[r] = 0;
    if ((scale16[r] & 0x7fff) == 0) scale16[r] = 0;
    if (min16[r] == 0x8000) min16[r] = 0;
  }
  found = {load_f16(scale16), load_f16(min16)};
  for (int r = 0; r < R; r++)
    if (blank[r]) scale16[r] = 0x7e00;
  return found;
}

// ---- one tile

template <int format>
static inline void pack_codes(const float* staged, int n, const float* importance, uint8_t* dst) {
  using Q = Code<format>;
  alignas(64) float t[C][R];
  alignas(32) uint16_t scale16[R], min16[R];
  transpose<R, C>(staged, t);
  const Numbers with = numbers_of<format>(t, n, importance, scale16, min16);
  for (int k = n; k < C; k++) store(t[k], with.least);  // padding columns: the code of zero
  const F inverse = inverse_of(with.scale), divisor = less(zero(), abs(with.scale), with.scale, set(__builtin_inff()));
  auto code = [&](int k) {
    const F y = above_least<format>(load(t[k]), with.least);
    if constexpr (format == DSO_INT8)
      return iadd(to_int(min(max(div(y, divisor), set(Q::least)), set(Q::most))), iset(Q::zero));
    else
      return iadd(to_int(nearest<format>(y, inverse)), iset(Q::zero));
  };
  auto byte = [&](int j, int b) {  // byte b of every lane of the j-th 64 bytes
    if constexpr (Q::bits == 8)
      return code(4 * j + b);
    else
      return iadd(code(8 * j + b), shl<4>(code(8 * j + 4 + b)));
  };
  for (int j = 0; j < C / 4 * Q::bits / 8; j++) {
    const I word = iadd(iadd(byte(j, 0), shl<8>(byte(j, 1))), iadd(shl<16>(byte(j, 2)), shl<24>(byte(j, 3))));
    store_bytes(dst + 64 * j, word);
  }
  uint8_t* tail = dst + C * R * Q::bits / 8;
  memcpy(tail, scale16, sizeof scale16);
  if constexpr (format == DSO_Q4_1) memcpy(tail + sizeof scale16, min16, sizeof min16);
}

// INT8_NESTED: `group` holds the upper 4 bits of the codes, in the layout of INT4, and `end_plane` the lower ones.
static inline void pack_nested(const float* staged, int n, uint8_t* group, uint8_t* end_plane) {
  constexpr int format = DSO_INT8_NESTED;
  alignas(64) float t[C][R];
  alignas(32) uint16_t scale16[R], unused[R];
  transpose<R, C>(staged, t);
  const Numbers with = numbers_of<format>(t, n, nullptr, scale16, unused);
  for (int k = n; k < C; k++) store(t[k], zero());
  const F inverse = inverse_of(mul(with.scale, set(1.0f / 16)));
  auto code = [&](int k) { return iadd(to_int(nearest<format>(load(t[k]), inverse)), iset(Code<format>::zero)); };
  auto planes = [&](auto nibble, uint8_t* plane) {
    for (int j = 0; j < C / 8; j++) {
      auto byte = [&](int b) { return iadd(nibble(code(8 * j + b)), shl<4>(nibble(code(8 * j + 4 + b)))); };
      store_bytes(plane + 64 * j, iadd(iadd(byte(0), shl<8>(byte(1))), iadd(shl<16>(byte(2)), shl<24>(byte(3)))));
    }
  };
  planes([](I code) { return sar<4>(code); }, group);
  planes([](I code) { return isub(code, shl<4>(sar<4>(code))); }, end_plane);
  memcpy(group + C * R / 2, scale16, sizeof scale16);
}

static inline void pack_bf16(const float* staged, uint8_t* dst) {
  alignas(64) uint16_t rows[R][C];
  for (int i = 0; i < R * C; i += lanes) store_bf16(&rows[0][0] + i, load(staged + i));
  transpose<R, C / 2>(rows, dst);  // pairs of columns move together
}

// ---- a band of FP8: 128 rows, with one scale per 128 columns

constexpr int E4M3_BLOCK = 128;

// Nearest even; |x| <= 448. Below 2^-6 values are multiples of 2^-9, which adding 2^14 rounds to.
static inline uint8_t to_e4m3(float x) {
  uint32_t u, small;
  memcpy(&u, &x, 4);
  const uint32_t magnitude = u & 0x7fffffff;
  float sum;
  memcpy(&sum, &magnitude, 4);
  sum += 16384.0f;
  memcpy(&small, &sum, 4);
  const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return (uint8_t)((magnitude < 0x3c800000 ? small - 0x46800000 : normal) | (u >> 24 & 0x80));
}

static inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7f, bits = magnitude == 0x7f ? 0x7fc00000 : (magnitude << 20) + (120u << 23);
  float x;
  memcpy(&x, &bits, 4);
  if (magnitude < 8) x = (float)magnitude * (1.0f / 512);
  return code & 0x80 ? -x : x;
}

// max|W| / 448 of a block, of which `rows` x `cols` exist; NaN if an element is NaN or infinite.
static inline float scale_of_block(int32_t src_type, const uint8_t* src, int64_t stride, int64_t rows, int64_t cols) {
  F most = zero(), nan = zero();
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c += C) {
      alignas(64) float row[C];
      read_row(src_type, src + r * stride + c * (src_type == DSO_SRC_F32 ? 4 : 2), cols - c < C ? cols - c : C, row);
      for (int k = 0; k < C; k += lanes) {
        const F x = load(row + k);
        most = max(abs(x), most), nan = fma(x, zero(), nan);
      }
    }
  return any_nan(nan) ? __builtin_nanf("") : largest(most) / 448.0f;
}

static void pack_band_fp8(int32_t src_type, const uint8_t* src, int64_t stride, int64_t rows, int64_t cols, uint8_t* dst) {
  const int64_t size = src_type == DSO_SRC_F32 ? 4 : 2, row_bytes = (cols + C - 1) / C * tile_bytes(DSO_FP8);
  for (int64_t first = 0; first < cols; first += E4M3_BLOCK) {
    const int64_t columns = cols - first < E4M3_BLOCK ? cols - first : E4M3_BLOCK;
    const float scale = scale_of_block(src_type, src + first * size, stride, rows, columns);
    const F divisor = set(scale), largest_code = set(448.0f);
    for (int64_t r0 = 0; r0 < rows; r0 += R)
      for (int64_t c = first; c < first + columns; c += C) {
        alignas(64) float x[R][C] = {};
        alignas(64) uint8_t codes[R][C];
        for (int64_t r = 0; scale > 0 && r < R && r0 + r < rows; r++) {
          read_row(src_type, src + (r0 + r) * stride + c * size, cols - c < C ? cols - c : C, x[r]);
          for (int k = 0; k < C; k += lanes)
            store(x[r] + k, max(min(div(load(x[r] + k), divisor), largest_code), sub(zero(), largest_code)));
        }
        for (int r = 0; r < R; r++)
          for (int k = 0; k < C; k++) codes[r][k] = to_e4m3(x[r][k]);
        uint8_t* tile = dst + r0 / R * row_bytes + c / C * tile_bytes(DSO_FP8);
        for (int r = 0; r < R; r++)
          for (int k = 0; k < C; k++) tile[fp8_at(r, k)] = codes[r][k];
        memset(tile + R * C, 0, (size_t)(tile_bytes(DSO_FP8) - R * C));
        memcpy(tile + R * C, &scale, 4);
      }
  }
}

// ---- unpacking one row

// Columns [0, 32) of row r of a tile of floats.
template <int format>
static inline void unpack_group(const uint8_t* tile, int r, float* out) {
  if constexpr (format == DSO_F32) {
    for (int k = 0; k < C; k++) memcpy(out + k, tile + (k * R + r) * 4, 4);
  } else if constexpr (format == DSO_BF16) {
    for (int k = 0; k < C; k += 2) {
      uint32_t pair;
      memcpy(&pair, tile + (k / 2 * R + r) * 4, 4);
      const uint32_t even = pair << 16, odd = pair & 0xffff0000u;
      memcpy(out + k, &even, 4), memcpy(out + k + 1, &odd, 4);
    }
  } else if constexpr (format == DSO_FP8) {
    float scale;
    memcpy(&scale, tile + R * C, 4);
    for (int k = 0; k < C; k++) out[k] = from_e4m3(tile[fp8_at(r, k)]) * scale;
  }
}

static inline float f16_at(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return from_f16(h);
}

// 4 columns of row r of a plane of `bits` bits, one per byte.
template <int bits>
static inline uint32_t plane_word(const uint8_t* plane, int quad, int r) {
  constexpr int per_vector = 8 / bits;
  uint32_t word;
  memcpy(&word, plane + 64 * (quad / per_vector) + 4 * r, 4);
  return word >> bits * (quad % per_vector) & 0x01010101u * ((1u << bits) - 1);
}

// Columns [32 g, 32 g + 32) of row r of a tile row, with `groups` groups, of an integer format.
template <int format>
static inline void unpack_integers(const uint8_t* row, int64_t g, int64_t groups, int r, float* out) {
  constexpr IntLayout layout = int_layout(format);
  constexpr bool joins = layout.split && !layout.nested;
  const uint8_t *group = row + group_at(layout, g), *head = row + head_at(layout, g, groups);
  const uint8_t* numbers = group + code_bytes(layout);
  for (int half = 0; half < layout.halves; half++) {
    float scale, least = 0;
    if constexpr (layout.powers) {
      const uint32_t e = numbers[r], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
      memcpy(&scale, &bits, 4);
    } else if constexpr (!layout.superblock) {
      scale = f16_at(numbers + 2 * r) * (joins ? 1.0f / 16 : 1.0f);
      if constexpr (layout.has_min) least = f16_at(numbers + 32 + 2 * r);
    } else {
      const uint8_t byte = numbers[16 * half + r];
      scale = f16_at(head + 2 * r) * (float)(layout.joined ? byte & 15 : (int8_t)byte);
      if constexpr (layout.has_min)
        least = f16_at(head + 32 + 2 * r) *
                (float)(layout.joined ? byte >> 4 : (int8_t)numbers[16 * layout.halves + 16 * half + r]);
    }
    // scale * code is exact, so only the sum with min rounds.
    const ByteScale by = byte_scale(scale, least, code_offset(format));
    for (int quad = 8 / layout.halves * half; quad < 8 / layout.halves * (half + 1); quad++) {
      uint32_t word = plane_word<layout.low>(group, quad, r);
      if constexpr (joins) word = word << 4 | plane_word<4>(head, quad, r);
      if constexpr (layout.high) word |= plane_word<layout.high>(group + 64 * layout.low, quad, r) << layout.low;
      if constexpr (has_table(format)) {
        uint8_t bytes[4];
        memcpy(bytes, &word, 4);
        for (uint8_t& byte : bytes) byte = table_of<format>[byte];
        memcpy(&word, bytes, 4);
      }
      scale_bytes<layout.has_min>(by, word, out + 4 * quad);
    }
  }
}

template <int format>
static void unpack_row(const Matrix& w, int64_t row, float scale, float* out) {
  const int64_t groups = (w.cols + C - 1) / C;
  const uint8_t* tile = w.data + row / R * groups * tile_bytes(format);
  alignas(64) float group[C];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t n = w.cols - g * C < C ? w.cols - g * C : C;
    if constexpr (int_layout(format).trellis)
      unpack_trellis(tile + g * tile_bytes(format), (int)(row % R), group);
    else if constexpr (int_layout(format).low)
      unpack_integers<format>(tile, g, groups, (int)(row % R), group);
    else
      unpack_group<format>(tile + g * tile_bytes(format), (int)(row % R), group);
    for (int64_t k = 0; k < n; k++) out[g * C + k] = group[k] * scale;
  }
}

}  // namespace packing

// One row of an embedding, times `scale`: exactly unpack_rows' values times it.
static void embed_row(const Matrix& w, int32_t row, float scale, float* out) {
  using namespace packing;
  switch (w.format) {
    case DSO_F32:
      return unpack_row<DSO_F32>(w, row, scale, out);
    case DSO_BF16:
      return unpack_row<DSO_BF16>(w, row, scale, out);
    case DSO_INT8:
      return unpack_row<DSO_INT8>(w, row, scale, out);
    case DSO_INT4:
      return unpack_row<DSO_INT4>(w, row, scale, out);
    case DSO_INT3:
      return unpack_row<DSO_INT3>(w, row, scale, out);
    case DSO_Q4_1:
      return unpack_row<DSO_Q4_1>(w, row, scale, out);
    case DSO_INT8_NESTED:
      return unpack_row<DSO_INT8_NESTED>(w, row, scale, out);
    case DSO_INT4_NESTED:
      return unpack_row<DSO_INT4_NESTED>(w, row, scale, out);
    case DSO_FP8:
      return unpack_row<DSO_FP8>(w, row, scale, out);
    case DSO_Q2_K:
      return unpack_row<DSO_Q2_K>(w, row, scale, out);
    case DSO_Q3_K:
      return unpack_row<DSO_Q3_K>(w, row, scale, out);
    case DSO_Q4_K:
      return unpack_row<DSO_Q4_K>(w, row, scale, out);
    case DSO_Q5_K:
      return unpack_row<DSO_Q5_K>(w, row, scale, out);
    case DSO_Q6_K:
      return unpack_row<DSO_Q6_K>(w, row, scale, out);
    case DSO_IQ4_XS:
      return unpack_row<DSO_IQ4_XS>(w, row, scale, out);
    case DSO_IQ4_NL:
      return unpack_row<DSO_IQ4_NL>(w, row, scale, out);
    case DSO_Q5_0:
      return unpack_row<DSO_Q5_0>(w, row, scale, out);
    case DSO_Q5_1:
      return unpack_row<DSO_Q5_1>(w, row, scale, out);
    case DSO_MXFP4:
      return unpack_row<DSO_MXFP4>(w, row, scale, out);
  }
}

static void unpack_rows(const Matrix& w, int64_t begin, int64_t end, float* out, int64_t stride) {
  for (int64_t row = begin; row < end; row++)
    embed_row(w, (int32_t)row, 1.0f, (float*)((uint8_t*)out + (row - begin) * stride));
}

// One tile row: rows [16 tile, 16 tile + 16) of src, whose rows are `stride` bytes apart, packed to their place in dst. FP8:
// 128 rows.
static void pack_tile(int32_t format, int32_t src_type, const void* src, int64_t rows, int64_t cols, int64_t stride,
                      const float* importance, int64_t tile, uint8_t* dst) {
  using namespace packing;
  const int64_t groups = (cols + C - 1) / C, size = src_type == DSO_SRC_F32 ? 4 : 2;
  if (format == DSO_FP8) {
    const int64_t first = tile * E4M3_BLOCK, n = rows - first < E4M3_BLOCK ? rows - first : E4M3_BLOCK;
    return pack_band_fp8(src_type, (const uint8_t*)src + first * stride, stride, n, cols,
                         dst + first / R * groups * tile_bytes(format));
  }
  const uint8_t* first_row = (const uint8_t*)src + tile * R * stride;
  const int64_t real_rows = rows - tile * R < R ? rows - tile * R : R;
  alignas(64) float staged[R * C], columns[C][R];
  if (real_rows < R) memset(staged, 0, sizeof staged);
  const bool split = format == DSO_INT8_NESTED || format == DSO_INT4_NESTED;
  dst += tile * groups * tile_bytes(format);
  uint8_t* const end_planes = dst + groups * tile_bytes(DSO_INT4);
  for (int64_t g = 0; g < groups; g++, dst += tile_bytes(split ? DSO_INT4 : format)) {
    const int64_t n = cols - g * C < C ? cols - g * C : C;
    for (int64_t r = 0; r < real_rows; r++) read_row(src_type, first_row + r * stride + g * C * size, n, staged + r * C);
    const float* weights = importance ? importance + g * C : nullptr;
    switch (format) {
      case DSO_F32:
        transpose<R, C>(staged, dst);
        break;
      case DSO_BF16:
        pack_bf16(staged, dst);
        break;
      case DSO_INT8:
        pack_codes<DSO_INT8>(staged, (int)n, nullptr, dst);
        break;
      case DSO_INT4:
        pack_codes<DSO_INT4>(staged, (int)n, weights, dst);
        break;
      case DSO_INT3:
        transpose<R, C>(staged, columns);
        pack_trellis(columns, (int)n, weights, dst);
        break;
      case DSO_Q4_1:
        pack_codes<DSO_Q4_1>(staged, (int)n, weights, dst);
        break;
      case DSO_INT8_NESTED:
      case DSO_INT4_NESTED:  // they have the same tiles
        pack_nested(staged, (int)n, dst, end_planes + g * split_bytes(int_layout(DSO_INT8_NESTED)));
        break;
    }
  }
}

}  // namespace dso::DSO_ISA_NAMESPACE
