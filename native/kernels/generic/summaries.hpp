// Summaries of full blocks: the element-wise maximum and minimum of the block's keys, and the estimates computed from them
// (Tang et al. 2024, Quest): no key of a block has a larger product with q than
//
//   e = sum over d of max(q_d largest_d, q_d smallest_d) = max(q, 0) . largest + min(q, 0) . smallest
//
// The summaries of 32 blocks of the cache, for one layer and kv head, form a panel like K's (kv.hpp), with blocks in place of
// tokens and the maxima's rows before the minima's: the estimates of 32 blocks are one product. Blocks are written one by one,
// each to its own column. A latent row is one key of all heads.
#pragma once
#include "attention.hpp"
#include "latent.hpp"

namespace dso::DSO_ISA_NAMESPACE {

DSO_INLINE int64_t summary_width(const KvLayout& l) { return l.rank ? l.rank + l.rope : l.head_dim; }
DSO_INLINE uint8_t* summary_panel(const KvLayout& l, const KvView& v, int64_t kv_head, int64_t panel) {
  return v.summaries + panel * v.summary_stride + kv_head * l.summary_bytes;
}

// Writes n elements to a block's column of the rows at `rows`.
static void write_column(int32_t type, const float* x, int64_t n, uint8_t* rows, int64_t column) {
  for (int64_t i = 0; i < n; i += 16) {
    uint16_t rounded[16];
    store_bf16(rounded, load(x + i, n - i));
    for (int64_t j = i; j < n && j < i + 16; j += type == DSO_KV_F32 ? 1 : 2) {
      if (type == DSO_KV_F32)
        ((float*)rows)[j * 32 + column] = x[j];
      else
        memcpy(rows + j / 2 * 128 + column * 4, rounded + j - i, 4);
    }
  }
}

// Elements [i, i + n) of a full block's summary; i is even.
static void write_summary(const KvLayout& l, const KvView& v, int64_t kv_head, int64_t block, int64_t i, int64_t n,
                          const float* largest, const float* smallest) {
  uint8_t* rows = summary_panel(l, v, kv_head, v.table[block] / summary_blocks) + (l.type == DSO_KV_F32 ? i : i / 2) * 128;
  const int64_t column = v.table[block] % summary_blocks;
  write_column(l.type, largest, n, rows, column);
  write_column(l.type, smallest, n, rows + l.summary_bytes / 2, column);
}

// Element i of 16 tokens' keys; with BF16 also i + 1.
DSO_INLINE void key_numbers(const KvLayout& l, const HeadLayout& h, const uint8_t* head, int64_t i, int64_t token, F (&x)[2]) {
  if (l.type == DSO_KV_F32) {
    x[0] = load((const float*)head + i * block_tokens + token);
  } else if (l.type == DSO_KV_INT8) {
    x[0] = mul(to_float(load_i8(head + i * block_tokens + token)), load((const float*)(head + h.k_scale) + token));
  } else {
    const B pair = load_bytes(head + i / 2 * 128 + token * 4);
    x[0] = even_bf16(pair);
    x[1] = odd_bf16(pair);
  }
}

static void kv_summarize(const KvLayout& l, const KvView& v, int64_t block) {
  const HeadLayout layout = head_layout(l.type, l.head_dim);
  const int64_t at_once = l.type == DSO_KV_BF16 ? 2 : 1;
  float high[max_head_dim], low[max_head_dim], panel[max_head_dim * block_tokens];
  KvLayout read = l;
  if (l.type == DSO_KV_INT4) read.type = DSO_KV_F32;  // from `panel`
  for (int64_t head = 0; head < l.kv_heads; ++head) {
    const uint8_t* keys = kv_head_block(v, layout, head, block);
    if (l.type == DSO_KV_INT4) {
      read_int4_panel(keys, (const float*)(keys + layout.k_scale), l.head_dim, panel);
      keys = (const uint8_t*)panel;
    }
    for (int64_t i = 0; i < l.head_dim; i += at_once) {
      F a[2], b[2];
      key_numbers(read, layout, keys, i, 0, a);
      key_numbers(read, layout, keys, i, 16, b);
      for (int64_t j = 0; j < at_once; ++j) {
        high[i + j] = largest(max(a[j], b[j]));
        low[i + j] = -largest(sub(zero(), min(a[j], b[j])));
      }
    }
    write_summary(l, v, head, block, 0, l.head_dim, high, low);
  }
}

// For a latent cache, several columns of all its rows at a time.
static void latent_summarize(const KvLayout& l, const KvView& v, int64_t block) {
  const int64_t width = summary_width(l);
  for (int64_t i = 0, n; i < width; i += n) {
    n = (i < l.rank ? l.rank : width) - i;
    if (n > latent_group) n = latent_group;
    float high[latent_group + 16], low[latent_group + 16], x[latent_group + 16];
    for (int64_t t = 0; t < block_tokens; ++t) {
      latent_part(l, latent_row(l, v, block * block_tokens + t), i, n, x);
      for (int64_t j = 0; j < n; j += 16) {
        const F number = load(x + j, n - j);
        store(high + j, t == 0 ? number : max(load(high + j, n - j), number), n - j);
        store(low + j, t == 0 ? number : min(load(low + j, n - j), number), n - j);
      }
    }
    write_summary(l, v, 0, block, i, n, high, low);
  }
}

// Rows of q, split into the factors of the maxima and of the minima, and into slices, each a tile in the form that `product`
// reads.
constexpr int64_t slice_width = 256;
constexpr int64_t slice_bytes = tile_rows * row_stride * 4;
static_assert(2 * max_summary_width / slice_width * slice_bytes <= (int64_t)sizeof(Workspace::room));

DSO_INLINE uint8_t* query_slice(Workspace& w, bool smallest, int64_t slice) {
  return (uint8_t*)w.room + (2 * slice + smallest) * slice_bytes;
}

template <Read T>
static void split_query(const float* q, int64_t width, int r, Workspace& w) {
  for (int64_t i = 0; i < width; i += 16) {
    const F x = load(q + i, width - i);
    uint8_t *up = query_slice(w, false, i / slice_width), *down = query_slice(w, true, i / slice_width);
    const int64_t at = r * row_stride + i % slice_width;
    if constexpr (narrow<T>) {
      round_bf16((uint16_t*)up + at, max(x, zero()));
      round_bf16((uint16_t*)down + at, min(x, zero()));
    } else {
      store((float*)up + at, max(x, zero()));
      store((float*)down + at, min(x, zero()));
    }
  }
}

// Estimates of P panels, `left` of which remain before the end, for the R rows in w.
template <Read T, int R, int P>
static void estimate(const KvLayout& l, const KvView& v, int64_t kv_head, const int32_t* panels, int64_t left, Workspace& w,
                     float* estimates, int64_t stride) {
  const int64_t width = summary_width(l);
  const uint8_t* panel[P];
  int64_t ahead[P];
  for (int p = 0; p < P; ++p) {
    panel[p] = summary_panel(l, v, kv_head, panels[p]);
    ahead[p] = p + P < left ? summary_panel(l, v, kv_head, panels[p + P]) - panel[p] : 0;
  }
  for (int64_t c = 0; c < summary_blocks; c += 16 * tile_cols) {
    F acc[P][R][tile_cols];
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < tile_cols; ++n) acc[p][r][n] = zero();
    for (int smallest = 0; smallest < 2; ++smallest)
      for (int64_t i = 0; i < width; i += slice_width) {
        const int64_t depth = width - i < slice_width ? width - i : slice_width;
        const uint8_t* rows[P];
        for (int p = 0; p < P; ++p)
          rows[p] = panel[p] + smallest * (l.summary_bytes / 2) + i / row_depth<T> * row_bytes<T> + c * column_bytes<T>;
        product<T, R, P>(query_slice(w, smallest, i / slice_width), rows, depth / row_depth<T>, ahead, acc);
      }
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < tile_cols; ++n) store(estimates + r * stride + p * summary_blocks + c + 16 * n, acc[p][r][n]);
  }
}

template <Read T>
static void estimates_of(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride, int64_t group,
                         int64_t r0, int64_t r1, const int32_t* panels, int64_t n, float* estimates, int64_t stride,
                         Workspace& w) {
  const int64_t count = (r1 - r0) * group, tiles = (count + tile_rows - 1) / tile_rows, width = summary_width(l);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t i0 = count * tile / tiles, i1 = count * (tile + 1) / tiles;
    for (int64_t i = i0; i < i1; ++i)
      split_query<T>((const float*)((const char*)q + (r0 + i / group) * q_stride) + i % group * width, width, (int)(i - i0), w);
    with_rows((int)(i1 - i0), [&](auto rows) {
      by_several<panels_at_once<rows.count>>(n, [&](int64_t p, auto several) {
        estimate<T, rows.count, several.count>(l, v, kv_head, panels + p, n - p, w,
                                               estimates + i0 * stride + p * summary_blocks, stride);
      });
    });
  }
}

static void block_estimates(const KvLayout& l, const KvView& v, int64_t kv_head, const float* q, int64_t q_stride,
                            int64_t group, int64_t r0, int64_t r1, const int32_t* panels, int64_t n, float* estimates,
                            int64_t stride, uint8_t* scratch) {
  Workspace& w = *(Workspace*)scratch;
  constexpr Read pairs = has_dot_bf16 ? Read::dot : Read::bf16;
  if (l.type == DSO_KV_F32)
    estimates_of<Read::f32>(l, v, kv_head, q, q_stride, group, r0, r1, panels, n, estimates, stride, w);
  else
    estimates_of<pairs>(l, v, kv_head, q, q_stride, group, r0, r1, panels, n, estimates, stride, w);
}

static void block_scores(const float* estimates, int64_t stride, int64_t group, int64_t n, float* scores) {
  const F none = set(minus_infinity());
  for (int64_t h = 0; h < group; ++h, estimates += stride) {
    F top = none;
    for (int64_t i = 0; i < n; i += 16)
      top = max(keep(load(estimates + i, n - i), 0, n - i, none), top);  // NaN: keeps the previous value
    const F most = set(largest(top));
    for (int64_t i = 0; i < n; i += 16) {
      const F score = min(sub(load(estimates + i, n - i), most), set(-minus_infinity()));  // NaN: infinity
      store_some(scores + i, h == 0 ? score : max(score, load(scores + i, n - i)), n - i);
    }
  }
}
}  // namespace dso::DSO_ISA_NAMESPACE
