// The layout inside a block of a latent cache: 32 rows of `rank` and `rope` elements, one per token, then 32 rows of `index`
// elements (KvLayout). With INT8 a row is
//
//   int8 [rank] | fp32 scale [ceil(rank / 128)] | bf16 [rope]
//
// with INT4, where groups of 128 elements are transformed (kv_int4.hpp) and two codes share a byte,
//
//   codes [rank / 2] | fp32 scale [ceil(rank / 128)] | int8 [rope] | fp32 scale [ceil(rope / 128)]
//
// and otherwise its elements one after the other. Rows are read directly, so a layer's block is one stream. Rows past a
// sequence's end are undefined.
#pragma once
#include "kv.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE uint8_t* latent_row(const KvLayout& l, const KvView& v, int64_t token) {
  return v.base + v.table[token / block_tokens] * v.block_stride + token % block_tokens * l.row_bytes;
}
// Offset of the rope part of an INT4 row.
DSO_INLINE int64_t int4_rope(const KvLayout& l) { return l.rank / 2 + (l.rank + latent_group - 1) / latent_group * 4; }
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

// n elements as int8 in groups, then the scales of the groups.
static void write_int8_groups(const float* x, int64_t n, uint8_t* out) {
  uint8_t* scales = out + n;
  for (int64_t i = 0; i < n; i += latent_group, scales += 4) {
    int8_t group[latent_group];
    const int64_t d = n - i < latent_group ? n - i : latent_group;
    const float scale = int8_row(x + i, d, group);
    memcpy(out + i, group, d);
    memcpy(scales, &scale, 4);
  }
}

static void write_int4_groups(const float* x, int64_t n, uint8_t* out) {
  uint8_t* scales = out + n / 2;
  for (int64_t i = 0; i < n; i += latent_group, scales += 4) {
    uint8_t codes[latent_group];
    const int64_t d = n - i < latent_group ? n - i : latent_group;
    const float scale = int4_row(x + i, d, codes);
    for (int64_t j = 0; j < d; j += 2) out[(i + j) / 2] = (uint8_t)(codes[j] | codes[j + 1] << 4);
    memcpy(scales, &scale, 4);
  }
}

// Elements [i, i + n) of `all`, within one group.
static void read_int8(const uint8_t* numbers, int64_t all, int64_t i, int64_t n, float* out) {
  float scale;
  memcpy(&scale, numbers + all + i / latent_group * 4, 4);
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) store(out + j, mul(to_float(load_i8(numbers + i + j)), set(scale)));
  for (; j < n; ++j) out[j] = (float)(int8_t)numbers[i + j] * scale;
}

static void latent_write(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* x, int64_t stride) {
  for (int64_t t = start; t < start + n; ++t, x = (const float*)((const char*)x + stride)) {
    uint8_t* row = latent_row(l, v, t);
    if (l.type == DSO_KV_F32) {
      memcpy(row, x, 4 * (l.rank + l.rope));
    } else if (l.type == DSO_KV_BF16) {
      write_bf16(x, l.rank + l.rope, row);
    } else if (l.type == DSO_KV_INT8) {
      write_int8_groups(x, l.rank, row);
      write_bf16(x + l.rank, l.rope, row + l.row_bytes - 2 * l.rope);
    } else {
      write_int4_groups(x, l.rank, row);
      write_int8_groups(x + l.rank, l.rope, row + int4_rope(l));
    }
  }
}

// Elements [i, i + n) of a row: with INT8 within one group of the first rank elements, or within the others; with INT4 a whole
// group of the first rank elements, or whole groups of the others.
static void latent_part(const KvLayout& l, const uint8_t* row, int64_t i, int64_t n, float* out) {
  if (l.type == DSO_KV_F32) {
    memcpy(out, row + 4 * i, 4 * n);
  } else if (l.type == DSO_KV_BF16) {
    read_bf16(row + 2 * i, n, out);
  } else if (l.type == DSO_KV_INT4 && i >= l.rank) {
    for (int64_t j = 0; j < n; j += latent_group)
      read_int8(row + int4_rope(l), l.rope, i - l.rank + j, n - j < latent_group ? n - j : latent_group, out + j);
  } else if (l.type == DSO_KV_INT4) {
    float scale;
    memcpy(&scale, row + l.rank / 2 + i / latent_group * 4, 4);
    read_int4_row(row + i / 2, 1, n, scale, out);
  } else if (i >= l.rank) {
    read_bf16(row + l.row_bytes - 2 * (l.rank + l.rope - i), n, out);
  } else {
    read_int8(row, l.rank, i, n, out);
  }
}

// A row's first rank elements, and its other elements if `turned` is given.
static void latent_numbers(const KvLayout& l, const uint8_t* row, float* latent, float* turned) {
  if (turned) latent_part(l, row, l.rank, l.rope, turned);
  const int64_t step = has_scales(l.type) ? latent_group : l.rank;
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

// An INT4 row as bf16 elements, transformed; `out` has room for 32 more than rank + rope.
static void int4_latent_to_bf16(const KvLayout& l, const uint8_t* row, uint8_t* out) {
  const uint8_t* scales = row + l.rank / 2;
  for (int64_t g = 0; g < l.rank; g += latent_group, scales += 4) {
    float number;
    memcpy(&number, scales, 4);
    const F scale = set(number);
    const int64_t end = g + latent_group < l.rank ? g + latent_group : l.rank;
    for (int64_t i = g; i < end; i += 32) {
      uint8_t rest[16] = {};
      const uint8_t* codes = row + i / 2;
      if (end - i < 32) codes = (const uint8_t*)memcpy(rest, codes, (end - i) / 2);
      I even, odd;
      look_up_halves(int4_values.numbers, codes, even, odd);
      store_bytes(out + 2 * i, round_pair_bf16(mul(to_float(even), scale), mul(to_float(odd), scale)));
    }
  }
  float turned[latent_group];
  for (int64_t i = 0; i < l.rope; i += latent_group) {
    const int64_t n = l.rope - i < latent_group ? l.rope - i : latent_group;
    read_int8(row + int4_rope(l), l.rope, i, n, turned);
    write_bf16(turned, n, out + 2 * (l.rank + i));
  }
}

// For INT4: elements from `begin`, the first of a group, on of a query of rank + rope elements, its latent part transformed.
static void latent_query_group(const KvLayout& l, const float* q, int64_t begin, float* out) {
  const int64_t rest = l.rank + l.rope - begin, latents = l.rank - begin;
  memcpy(out, q + begin, 4 * (rest < latent_group ? rest : latent_group));
  if (latents > 0) hadamard_inverse(out, latents < latent_group ? latents : latent_group);
}

// For INT4: an output of attention, to the space of the latents.
static void finish_latent(const KvLayout& l, float* o) {
  for (int64_t i = 0; i < l.rank; i += latent_group)
    hadamard_inverse(o + i, l.rank - i < latent_group ? l.rank - i : latent_group);
}

// An INT8 row as bf16 elements; `out` has room for 16 more than rank + rope.
static void int8_latent_to_bf16(const KvLayout& l, const uint8_t* row, uint8_t* out) {
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
