// Attention for training, for its tests and its benchmark: rows of tokens that contain sequences, in any layout, and the
// results of a call.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "check.hpp"
#include "dso_train.h"

struct Shape {
  int type, rows, row_tokens, heads, kv_heads, qk_width, v_width;
  int64_t window = 0;
  float magnitude = 1;  // of q
  float scale() const { return 1 / std::sqrt((float)qk_width); }
  int64_t tokens() const { return (int64_t)rows * row_tokens; }
};

struct Sequences {
  std::vector<int64_t> begin, end;
  void add(int64_t b, int64_t e) { begin.push_back(b), end.push_back(e); }
};

// Elements [rows, row_tokens, heads, width] as tokens of heads, or as heads of tokens, with gaps between rows.
class Tensor {
 public:
  Tensor(const Shape& s, int heads, int width, bool by_head, int64_t gap = 0)
      : type(s.type), heads(heads), width(width), row_tokens_(s.row_tokens) {
    const int64_t line = width + gap;
    token = by_head ? line : heads * line, head = by_head ? s.row_tokens * line : line, row = s.row_tokens * heads * line + gap;
    memory_ = std::make_unique<Buffer>((size_t)(s.rows * row) * size());
  }
  size_t size() const { return type == DSO_TYPE_BF16 ? 2 : 4; }
  dso_train_heads view() { return {memory_->get(), row, token, head}; }
  int64_t place(int64_t t, int64_t h) const { return t / row_tokens_ * row + t % row_tokens_ * token + h * head; }
  float at(int64_t t, int64_t h, int64_t c) const {
    const uint8_t* p = memory_->get() + (size_t)(place(t, h) + c) * size();
    if (type == DSO_TYPE_BF16) return from_bits((uint32_t)(p[0] | p[1] << 8) << 16);
    float x;
    memcpy(&x, p, 4);
    return x;
  }
  void put(int64_t t, int64_t h, int64_t c, float x) {
    uint8_t* p = memory_->get() + (size_t)(place(t, h) + c) * size();
    const uint32_t bits = to_bits(type == DSO_TYPE_BF16 ? rounded_bf16(x) : x);
    if (type == DSO_TYPE_BF16)
      p[0] = (uint8_t)(bits >> 16), p[1] = (uint8_t)(bits >> 24);
    else
      memcpy(p, &x, 4);
  }
  void fill(float scale, Random& random) {
    const int64_t tokens = (int64_t)(memory_->size() / size()) / row * row_tokens_;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t c = 0; c < width; ++c) put(t, h, c, scale * random.normal());
  }
  bool same(const Tensor& other) const { return memcmp(memory_->get(), other.memory_->get(), memory_->size()) == 0; }

  int type, heads, width;
  int64_t row, token, head;

 private:
  int64_t row_tokens_;
  std::unique_ptr<Buffer> memory_;
};

struct Inputs {
  Shape shape;
  Tensor q, k, v, o_grad;

  Inputs(const Shape& s, int layout, Random& random)
      : shape(s),
        q(s, s.heads, s.qk_width, layout & 1, layout & 2),
        k(s, s.kv_heads, s.qk_width, layout & 2, layout & 1),
        v(s, s.kv_heads, s.v_width, layout & 1, 0),
        o_grad(s, s.heads, s.v_width, layout & 2, layout & 1) {
    q.fill(s.magnitude, random), k.fill(1, random), v.fill(1, random), o_grad.fill(1, random);
  }
};

struct Results {
  Tensor o, q_grad, k_grad, v_grad;
  std::vector<float> state;

  Results(const Shape& s, int layout)
      : o(s, s.heads, s.v_width, layout & 2, layout & 1),
        q_grad(s, s.heads, s.qk_width, layout & 1, layout & 2),
        k_grad(s, s.kv_heads, s.qk_width, layout & 2, 0),
        v_grad(s, s.kv_heads, s.v_width, layout & 1, 2),
        state((size_t)(2 * s.heads * s.tokens()), -7.0f) {}
  bool same(const Results& r) const {
    return o.same(r.o) && q_grad.same(r.q_grad) && k_grad.same(r.k_grad) && v_grad.same(r.v_grad) && state == r.state;
  }
};

inline dso_train_attention call_of(Inputs& in, Results& out, const Sequences& of) {
  const Shape& s = in.shape;
  dso_train_attention a{};
  a.type = s.type, a.heads = s.heads, a.kv_heads = s.kv_heads, a.qk_width = s.qk_width, a.v_width = s.v_width,
  a.scale = s.scale(), a.window = s.window;
  a.rows = s.rows, a.row_tokens = s.row_tokens, a.sequences = (int64_t)of.begin.size(), a.begin = of.begin.data(),
  a.end = of.end.data();
  a.q = in.q.view(), a.k = in.k.view(), a.v = in.v.view(), a.o = out.o.view(), a.state = out.state.data(),
  a.o_grad = in.o_grad.view();
  a.q_grad = out.q_grad.view(), a.k_grad = out.k_grad.view(), a.v_grad = out.v_grad.view();
  return a;
}
