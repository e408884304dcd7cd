// All kernels in plain scalar code, for F32 weights, F32 rows and an F32 cache: a reference for the interpreter that shares no
// code with the real kernels, and shows that the runtime relies only on their interface.
#pragma once
#include <algorithm>
#include <vector>

#include "check.hpp"
#include "exact_fma.hpp"

namespace scalar {

inline float weight(const Matrix& w, int64_t r, int64_t c) {  // F32 tiles: [32 k][16 r]
  const int64_t groups = (w.cols + 31) / 32;
  return ((const float*)w.data)[((r / 16 * groups + c / 32) * 32 + c % 32) * 16 + r % 16];
}

inline void convert(int32_t, const float*, int64_t, int64_t, int64_t, void*) { abort(); }

inline void linear(const Matrix& w, const float* bias, int32_t, const uint8_t* x, int64_t x_stride, int64_t T, bool,
                   int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t*) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t r = 16 * tile_begin; r < std::min<int64_t>(w.rows, 16 * tile_end); ++r) {
      float sum = 0;
      for (int64_t c = 0; c < w.cols; ++c) sum += weight(w, r, c) * ((const float*)(x + t * x_stride))[c];
      ((float*)((uint8_t*)y + t * y_stride))[r] = sum + (bias ? bias[r] : 0);
    }
}

inline void embed_row(const Matrix& w, int32_t row, float scale, float* out) {
  for (int64_t c = 0; c < w.cols; ++c) out[c] = weight(w, row, c) * scale;
}
inline void unpack_rows(const Matrix& w, int64_t begin, int64_t end, float* out, int64_t stride) {
  for (int64_t r = begin; r < end; ++r) embed_row(w, (int32_t)r, 1, (float*)((uint8_t*)out + (r - begin) * stride));
}
inline void pack_tile(int32_t, int32_t, const void* src, int64_t rows, int64_t cols, int64_t stride, const float*, int64_t tile,
                      uint8_t* dst) {
  const int64_t groups = (cols + 31) / 32;
  for (int64_t k = 0; k < groups * 32; ++k)
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t row = 16 * tile + r;
      ((float*)dst)[(tile * groups * 32 + k) * 16 + r] =
          row < rows && k < cols ? ((const float*)((const uint8_t*)src + row * stride))[k] : 0;
    }
}

inline void rms_norm(const float* x, const float* w, int64_t n, float eps, float* out) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1 / std::sqrt(sum / (float)n + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * w[i];
}
inline void layer_norm(const float* x, const float* w, const float* b, int64_t n, float eps, float* out) {
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < n; ++i) mean += x[i] / (double)n;
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / (double)n;
  for (int64_t i = 0; i < n; ++i) out[i] = (float)((x[i] - mean) / std::sqrt(variance + eps) * w[i] + b[i]);
}
inline void add(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}
inline void swiglu(const float* g, const float* u, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
}
inline void softmax(const float* x, int64_t n, float* out) {
  float sum = 0;
  const float top = *std::max_element(x, x + n);
  for (int64_t i = 0; i < n; ++i) sum += out[i] = std::exp(x[i] - top);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}
inline void sigmoid(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 1 / (1 + std::exp(-x[i]));
}
inline void scale(const float* x, float factor, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}
inline void add_scaled(const float* x, float scale, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = exact_fma(x[i], scale, y[i]);
}
inline void rope(const float* x, const float* table, int64_t heads, int64_t d, int64_t offset, int64_t rot, bool interleaved,
                 float* out) {
  for (int64_t h = 0; h < heads; ++h, x += d, out += d) {
    for (int64_t i = 0; i < rot / 2; ++i) {
      const int64_t p = offset + (interleaved ? 2 * i : i), q = offset + (interleaved ? 2 * i + 1 : i + rot / 2);
      const float a = x[p], b = x[q], c = table[i], s = table[rot / 2 + i];
      out[p] = a * c - b * s;
      out[q] = b * c + a * s;
    }
    for (int64_t i = 0; i < d; ++i)
      if (i < offset || i >= offset + rot) out[i] = x[i];
  }
}

inline int64_t kv_layer_bytes(int32_t, int64_t kv_heads, int64_t head_dim) { return 2 * kv_heads * 32 * head_dim * 4; }
inline float* kv(const KvLayout& l, const KvView& v, int64_t head, int64_t token, bool value) {
  float* block = (float*)(v.base + v.table[token / 32] * v.block_stride);
  return block + ((head * 2 + value) * 32 + token % 32) * l.head_dim;
}
inline void kv_write(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* k, int64_t k_stride,
                     const float* val, int64_t v_stride, int64_t h0, int64_t h1) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t h = h0; h < h1; ++h) {
      std::copy_n((const float*)((const char*)k + t * k_stride) + h * l.head_dim, l.head_dim, kv(l, v, h, start + t, false));
      std::copy_n((const float*)((const char*)val + t * v_stride) + h * l.head_dim, l.head_dim, kv(l, v, h, start + t, true));
    }
}
inline void kv_read(const KvLayout& l, const KvView& v, int64_t tokens, float* key, float* value) {
  for (int64_t h = 0; h < l.kv_heads; ++h)
    for (int64_t t = 0; t < tokens; ++t, key += l.head_dim, value += l.head_dim) {
      std::copy_n(kv(l, v, h, t, false), l.head_dim, key);
      std::copy_n(kv(l, v, h, t, true), l.head_dim, value);
    }
}

// Softmax over tokens: m, the sum, and the weighted values, not divided by the sum. sink: a further logit, or null.
inline void attend(const KvLayout& l, const KvView& v, int64_t head, const float* q, const std::vector<int64_t>& tokens,
                   const Scores& how, const float* sink, float* m, float* sum, float* o) {
  *m = sink ? *sink : -INFINITY;
  *sum = 0;
  std::fill_n(o, l.head_dim, 0.0f);
  std::vector<float> scores;
  for (int64_t t : tokens) {
    float s = 0;
    for (int64_t i = 0; i < l.head_dim; ++i) s += q[i] * kv(l, v, head, t, false)[i];
    s *= how.scale;
    scores.push_back(how.softcap > 0 ? how.softcap * std::tanh(s / how.softcap) : s);
    *m = std::max(*m, scores.back());
  }
  if (sink) *sum = std::exp(*sink - *m);
  for (size_t j = 0; j < tokens.size(); ++j) {
    const float p = std::exp(scores[j] - *m);
    *sum += p;
    for (int64_t i = 0; i < l.head_dim; ++i) o[i] += p * kv(l, v, head, tokens[j], true)[i];
  }
}
inline void attn_eager(const KvLayout& l, const KvView& v, int64_t head, const float* q, int64_t n, int64_t first,
                       const Scores& scores, const CacheCopy*, float* row, float* o) {  // without copies
  std::fill_n(row, n, 0.0f);                                                            // the caller guarantees room for them
  std::vector<int64_t> tokens;
  for (int64_t t = first; t < n; ++t) tokens.push_back(t);
  float m, sum;
  attend(l, v, head, q, tokens, scores, scores.sinks, &m, &sum, o);
  for (int64_t i = 0; i < l.head_dim; ++i) o[i] /= sum;
}
// Tokens visible to `row`, within the chunk (-1: all chunks).
inline std::vector<int64_t> seen(const VisibleTokens& sight, int64_t row, int64_t chunk) {
  std::vector<int64_t> tokens;
  if (!sight.chosen) {
    for (int64_t t = 0; t <= row; ++t)
      if ((sight.window == 0 || t >= sight.begin(row) || t < sight.sinks) && (chunk < 0 || t / attn_chunk == chunk))
        tokens.push_back(t);
    return tokens;
  }
  for (int64_t i = 0; i < sight.blocks; ++i)
    for (int64_t t = 32 * (int64_t)sight.chosen[i]; t < 32 * ((int64_t)sight.chosen[i] + 1) && t <= row; ++t)
      if (chunk < 0 || i / (attn_chunk / 32) == chunk) tokens.push_back(t);
  return tokens;
}
inline void attn_prefill(const KvLayout& l, const KvView& v, int64_t head, const float* q, int64_t q_stride, int64_t group,
                         int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight, const Scores& scores,
                         const CacheCopy*, float* o, int64_t o_stride, uint8_t*) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t h = 0; h < group; ++h) {
      float m, sum, *out = (float*)((char*)o + r * o_stride) + h * l.head_dim;
      attend(l, v, head, (const float*)((const char*)q + r * q_stride) + h * l.head_dim, seen(sight, ctx + r, -1), scores,
             scores.sinks ? scores.sinks + h : nullptr, &m, &sum, out);
      for (int64_t i = 0; i < l.head_dim; ++i) out[i] /= sum;
    }
}
inline void attn_decode_chunk(const KvLayout& l, const KvView& v, int64_t head, const float* q, int64_t q_stride, int64_t group,
                              int64_t r0, int64_t r1, int64_t ctx, const VisibleTokens& sight, const Scores& scores,
                              int64_t chunk, float* part, uint8_t*) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t h = 0; h < group; ++h, part += l.head_dim + 16)
      attend(l, v, head, (const float*)((const char*)q + r * q_stride) + h * l.head_dim, seen(sight, ctx + r, chunk), scores,
             nullptr, part, part + 1, part + 16);
}
inline void attn_merge(const float* part, int64_t stride, int64_t chunks, int64_t d, const float* sink, float* out) {
  float m = sink ? *sink : -INFINITY;
  for (int64_t c = 0; c < chunks; ++c) m = std::max(m, part[c * stride]);
  float sum = sink ? std::exp(*sink - m) : 0;
  std::fill_n(out, d, 0.0f);
  for (int64_t c = 0; c < chunks; ++c) {
    const float p = std::exp(part[c * stride] - m);
    sum += p * part[c * stride + 1];
    for (int64_t i = 0; i < d; ++i) out[i] += p * part[c * stride + 16 + i];
  }
  for (int64_t i = 0; i < d; ++i) out[i] /= sum;
}

// The indexer's keys, in a cache of fp32 or bf16 rows, after the latents.
inline uint8_t* index_row(const KvLayout& l, const KvView& v, int64_t t) {
  return v.base + v.table[t / 32] * v.block_stride + 32 * l.row_bytes + t % 32 * l.index_bytes;
}
inline float index_number(const KvLayout& l, const KvView& v, int64_t t, int64_t i) {
  const uint8_t* row = index_row(l, v, t);
  if (l.type == DSO_KV_F32) return ((const float*)row)[i];
  return from_bits((uint32_t)((const uint16_t*)row)[i] << 16);
}
inline void index_write(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* k, int64_t stride) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < l.index; ++i) {
      const float x = ((const float*)((const char*)k + t * stride))[i];
      const uint32_t u = to_bits(x);
      if (l.type == DSO_KV_F32)
        ((float*)index_row(l, v, start + t))[i] = x;
      else
        ((uint16_t*)index_row(l, v, start + t))[i] =
            (uint16_t)(std::isnan(x) ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
}
inline void index_query(const KvLayout& l, int64_t heads, const float* q, uint8_t* packed) {
  memcpy(packed, q, (size_t)(heads * l.index) * 4);
}
inline int64_t index_query_bytes(int64_t heads, int64_t index) { return heads * index * 4; }
inline double index_score(const KvLayout& l, const KvView& v, int64_t heads, const float* q, const float* w, int64_t t,
                          double scale) {
  double score = 0;
  for (int64_t h = 0; h < heads; ++h) {
    double x = 0;
    for (int64_t i = 0; i < l.index; ++i) x += (double)q[h * l.index + i] * index_number(l, v, t, i);
    score += (x < 0 ? 0 : x) * w[h];
  }
  return score * scale;
}
inline void index_scores(const KvLayout& l, const KvView& v, int64_t heads, const uint8_t* q, const float* w, int64_t begin,
                         int64_t end, float scale, float* scores) {
  for (int64_t t = begin; t < end; ++t) {
    const float s = (float)index_score(l, v, heads, (const float*)q, w, t, scale);
    scores[t - begin] = std::isnan(s) ? INFINITY : s;
  }
}
inline void index_select(const float* scores, int64_t n, int64_t k, float* chosen) {
  std::vector<int64_t> order((size_t)n);
  for (int64_t i = 0; i < n; ++i) order[(size_t)i] = i;
  std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::sort(order.begin(), order.begin() + k);
  for (int64_t i = 0; i < k; ++i) chosen[i] = (float)order[(size_t)i];
}

inline void add_row(const float* a, const float* b, int64_t n, float, float* out) { add(a, b, n, out); }
inline void clamped_swiglu(const float* g, const float* u, int64_t n, float alpha, float limit, float raise, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float gate = std::min(g[i], limit), up = std::clamp(u[i], -limit, limit);
    out[i] = (up + raise) * gate / (1 + std::exp(-alpha * gate));
  }
}
inline void swiglu_row(const float* a, const float* b, int64_t n, float, float* out) { swiglu(a, b, n, out); }
inline constexpr ElementwiseOp elementwise_ops[] = {{DSO_OP_ADD, "ADD", 2, add_row}, {DSO_OP_SWIGLU, "SWIGLU", 2, swiglu_row}};

inline const Kernels table = [] {
  Kernels k{};
  k.isa = "scalar";
  k.elementwise_ops = elementwise_ops;
  k.elementwise_count = std::size(elementwise_ops);
  k.convert = convert;
  k.linear = linear;
  k.embed_row = embed_row;
  k.unpack_rows = unpack_rows;
  k.pack_tile = pack_tile;
  k.rms_norm = rms_norm;
  k.layer_norm = layer_norm;
  k.add = add;
  k.swiglu = swiglu;
  k.clamped_swiglu = clamped_swiglu;
  k.softmax = softmax;
  k.sigmoid = sigmoid;
  k.add_scaled = add_scaled;
  k.scale = scale;
  k.rope = rope;
  k.kv_layer_bytes = kv_layer_bytes;
  k.kv_write = kv_write;
  k.kv_read = kv_read;
  k.attn_decode_chunk = attn_decode_chunk;
  k.attn_merge = attn_merge;
  k.attn_prefill = attn_prefill;
  k.attn_eager = attn_eager;
  k.index_write = index_write;
  k.index_query = index_query;
  k.index_query_bytes = index_query_bytes;
  k.index_scores = index_scores;
  k.index_select = index_select;
  return k;
}();

}  // namespace scalar
