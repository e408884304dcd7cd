// The layout inside a block of a latent cache: 32 rows of `rank` and `rope` elements, one per token, then 32 rows of `index`
// elements (KvLayout). With INT8 a row is
//
//   int8 [rank] | fp32 scale [ceil(rank / 128)] | bf16 [rope]
//
// and otherwise its elements one after the other. Rows are read directly, so a layer's block is one stream. Rows past a
// sequence's end are undefined.
#pragma once
#include "kv.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE uint8_t* latent_row(const KvLayout& l, const KvView& v, int64_t token) {
  return v.base + v.table[token / block_tokens] * v.block_stride + token % block_tokens * l.row_bytes;
}
DSO_INLINE uint8_t* index_row(const KvLayout& l, const KvView& v, int64_t token) {
  return v.base + v.table[token / block_tokens] * v.block_stride + block_tokens * l.row_bytes +
         token % block_tokens * l.index_bytes;
}

// Writes n elements as bf16, and nothing after them: the next row may be in use.
static void write_bf16(const float* x, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(out + 2 * i, load(x + i));
  if (i == n) return;
  uint16_t rest[16];
  store_bf16(rest, load(x + i, n - i));
  memcpy(out + 2 * i, rest, 2 * (n - i));
}

static void read_bf16(const uint8_t* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load_bf16(x + 2 * i));
  for (; i < n; ++i) {
    uint16_t bits;
    memcpy(&bits, x + 2 * i, 2);
    out[i] = from_bf16(bits);
  }
}

static void latent_write(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* x, int64_t stride) {
  for (int64_t t = start; t < start + n; ++t, x = (const float*)((const char*)x + stride)) {
    uint8_t* row = latent_row(l, v, t);
    if (l.type == DSO_KV_F32) {
      memcpy(row, x, 4 * (l.rank + l.rope));
    } else if (l.type == DSO_KV_BF16) {
      write_bf16(x, l.rank + l.rope, row);
    } else {
      uint8_t* scales = row + l.rank;
      for (int64_t i = 0; i < l.rank; i += latent_group, scales += 4) {
        int8_t group[latent_group];
        const int64_t d = l.rank - i < latent_group ? l.rank - i : latent_group;
        const float scale = int8_row(x + i, d, group);
        memcpy(row + i, group, d);
        memcpy(scales, &scale, 4);
      }
      write_bf16(x + l.rank, l.rope, scales);
    }
  }
}

// Elements [i, i + n) of a row: with INT8 either within one group of the first rank elements, or within the others.
static void latent_part(const KvLayout& l, const uint8_t* row, int64_t i, int64_t n, float* out) {
  if (l.type == DSO_KV_F32) {
    memcpy(out, row + 4 * i, 4 * n);
  } else if (l.type == DSO_KV_BF16) {
    read_bf16(row + 2 * i, n, out);
  } else if (i >= l.rank) {
    read_bf16(row + l.row_bytes - 2 * (l.rank + l.rope - i), n, out);
  } else {
    float scale;
    memcpy(&scale, row + l.rank + i / latent_group * 4, 4);
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) store(out + j, mul(to_float(load_i8(row + i + j)), set(scale)));
    for (; j < n; ++j) out[j] = (float)(int8_t)row[i + j] * scale;
  }
}

// A row's first rank elements, and its other elements if `turned` is given.
static void latent_numbers(const KvLayout& l, const uint8_t* row, float* latent, float* turned) {
  if (turned) latent_part(l, row, l.rank, l.rope, turned);
  const int64_t step = l.type == DSO_KV_INT8 ? latent_group : l.rank;
  for (int64_t i = 0; i < l.rank; i += step) latent_part(l, row, i, l.rank - i < step ? l.rank - i : step, latent + i);
}

static void latent_read(const KvLayout& l, const KvView& v, int64_t tokens, float* latent, float* index) {
  for (int64_t t = 0; t < tokens; ++t, latent += l.rank + l.rope) {
    latent_numbers(l, latent_row(l, v, t), latent, latent + l.rank);
    if (!index) continue;
    if (l.type == DSO_KV_F32)
      memcpy(index, index_row(l, v, t), 4 * l.index);
    else
      read_bf16(index_row(l, v, t), l.index, index);
    index += l.index;
  }
}

// An INT8 row as bf16 elements; `out` has room for 16 more than rank + rope.
static void latent_to_bf16(const KvLayout& l, const uint8_t* row, uint8_t* out) {
  const uint8_t* scales = row + l.rank;
  for (int64_t g = 0; g < l.rank; g += latent_group, scales += 4) {
    float scale;
    memcpy(&scale, scales, 4);
    const int64_t end = g + latent_group < l.rank ? g + latent_group : l.rank;
    int64_t i = g;
    for (; i + 16 <= end; i += 16) round_bf16(out + 2 * i, mul(to_float(load_i8(row + i)), set(scale)));
    if (i == end) continue;
    uint8_t rest[16] = {};
    memcpy(rest, row + i, end - i);
    round_bf16(out + 2 * i, mul(to_float(load_i8(rest)), set(scale)));
  }
  memcpy(out + 2 * l.rank, scales, 2 * l.rope);
}
}  // namespace dso::DSO_ISA_NAMESPACE
