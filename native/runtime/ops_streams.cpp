// Hyper-connections: the weights of a token's streams, and the sums that they weigh. graph/ops/streams.py has the formulas.
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.hpp"

namespace dso {
namespace {

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

class StreamWeights final : public RowOp {
 public:
  StreamWeights(const SlotRef& in, const SlotRef& out, const float* bias, const float* scale, int64_t count, int64_t steps,
                float eps)
      : in_(in), out_(out), bias_(bias), scale_(scale), n_(count), steps_(steps), eps_(eps) {}
  int64_t scratch_bytes(const Run&) const override { return 4 * n_; }

 private:
  int64_t rows(const Run& run) const override { return run.slots[in_.index].count; }
  int64_t row_work() const override { return in_.width * (8 + 2 * steps_); }

  void row(const Run& run, int64_t r, int thread) override {
    const float* x = run.slots[in_.index].f32(r);
    float* y = run.slots[out_.index].f32(r);
    for (int64_t i = 0; i < n_; ++i) y[i] = sigmoid(x[i] * scale_[0] + bias_[i]) + eps_;
    if (in_.width == n_) return;
    for (int64_t i = n_; i < 2 * n_; ++i) y[i] = 2 * sigmoid(x[i] * scale_[1] + bias_[i]);
    float *comb = y + 2 * n_, *sums = reinterpret_cast<float*>(run.thread_scratch(thread));
    for (int64_t i = 0; i < n_ * n_; ++i) comb[i] = x[2 * n_ + i] * scale_[2] + bias_[2 * n_ + i];
    for (int64_t j = 0; j < n_; ++j) {
      float* line = comb + j * n_;
      const float top = *std::max_element(line, line + n_);
      float sum = 0;
      for (int64_t k = 0; k < n_; ++k) sum += line[k] = std::exp(line[k] - top);
      for (int64_t k = 0; k < n_; ++k) line[k] = line[k] / sum + eps_;
    }
    for (int64_t step = 0; step < steps_; ++step) {
      for (int64_t j = 0; step > 0 && j < n_; ++j) {
        float sum = 0;
        for (int64_t k = 0; k < n_; ++k) sum += comb[j * n_ + k];
        for (int64_t k = 0; k < n_; ++k) comb[j * n_ + k] /= sum + eps_;
      }
      std::fill_n(sums, n_, 0.0f);
      for (int64_t j = 0; j < n_; ++j)
        for (int64_t k = 0; k < n_; ++k) sums[k] += comb[j * n_ + k];
      for (int64_t j = 0; j < n_; ++j)
        for (int64_t k = 0; k < n_; ++k) comb[j * n_ + k] /= sums[k] + eps_;
    }
  }
  const SlotRef in_, out_;
  const float *bias_, *scale_;
  const int64_t n_, steps_;
  const float eps_;
};

// A task is some columns of one row of the result.
class StreamOp : public Op {
 public:
  StreamOp(const SlotRef& streams, const SlotRef& weights, const SlotRef& out, int64_t count, int64_t width)
      : streams_(streams), weights_(weights), out_(out), n_(count), width_(width) {}
  void shape(const Run&) override {}
  int64_t work(const Run& run) const override { return run.slots[streams_.index].count * streams_.width; }
  int64_t tasks(const Run& run) const override { return run.slots[streams_.index].count * ceil_div(width_, kColumns); }
  void task(const Run& run, int64_t index, int) override {
    const int64_t parts = ceil_div(width_, kColumns), column = index % parts * kColumns;
    columns(run, index / parts, column, std::min(kColumns, width_ - column));
  }

 protected:
  virtual void columns(const Run& run, int64_t row, int64_t column, int64_t n) = 0;
  const SlotRef streams_, weights_, out_;
  const int64_t n_, width_;

 private:
  static constexpr int64_t kColumns = 1024;
};

class Collapse final : public StreamOp {
 public:
  using StreamOp::StreamOp;

 private:
  void columns(const Run& run, int64_t row, int64_t column, int64_t n) override {
    const float *s = run.slots[streams_.index].f32(row) + column, *w = run.slots[weights_.index].f32(row);
    float* y = run.slots[out_.index].f32(row) + column;
    run.kernels.scale(s, w[0], n, y);
    for (int64_t i = 1; i < n_; ++i) run.kernels.add_scaled(s + i * width_, w[i], n, y);
  }
};

class Expand final : public StreamOp {
 public:
  Expand(const SlotRef& streams, const SlotRef& weights, const SlotRef& y, const SlotRef& out, int64_t count)
      : StreamOp(streams, weights, out, count, y.width), y_(y) {}

 private:
  void columns(const Run& run, int64_t row, int64_t column, int64_t n) override {
    const float *s = run.slots[streams_.index].f32(row) + column, *w = run.slots[weights_.index].f32(row);
    const float *y = run.slots[y_.index].f32(row) + column, *comb = w + 2 * n_;
    for (int64_t k = 0; k < n_; ++k) {
      float* z = run.slots[out_.index].f32(row) + k * width_ + column;
      run.kernels.scale(y, w[n_ + k], n, z);
      for (int64_t j = 0; j < n_; ++j) run.kernels.add_scaled(s + j * width_, comb[j * n_ + k], n, z);
    }
  }
  const SlotRef y_;
};

int64_t count_of(StepReader& s) { return s.positive("groups", s.step.groups); }

}  // namespace

std::unique_ptr<Op> make_stream_weights(StepReader& s) {
  s.takes(1, 1, 2, 0, 0);
  const int64_t n = count_of(s), steps = s.positive("top_k", s.step.top_k);
  const SlotRef in = s.in(0, kF32Only), out = s.out(0, kF32Only, in.width, in.selected);
  if (in.width != n && in.width != (2 + n) * n)
    s.refuse("in[0] has width %lld, must be %lld or %lld with %lld streams", (long long)in.width, (long long)n,
             (long long)((2 + n) * n), (long long)n);
  const float *bias = s.vector('w', 0, in.width), *scale = s.vector('w', 1, in.width == n ? 1 : 3);
  return std::make_unique<StreamWeights>(in, out, bias, scale, n, steps, s.eps());
}

std::unique_ptr<Op> make_stream_collapse(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const int64_t n = count_of(s);
  const SlotRef streams = s.in(0, kF32Only), weights = s.in(1, kF32Only), out = s.out(0, kF32Only, 0, streams.selected);
  if (streams.width != n * out.width || weights.width < n || weights.selected != streams.selected)
    s.refuse("in[0] of width %lld and in[1] of width %lld do not fit %lld streams of %lld elements", (long long)streams.width,
             (long long)weights.width, (long long)n, (long long)out.width);
  s.alias_only(out, SlotRef{});
  return std::make_unique<Collapse>(streams, weights, out, n, out.width);
}

std::unique_ptr<Op> make_stream_expand(StepReader& s) {
  s.takes(3, 1, 0, 0, 0);
  const int64_t n = count_of(s);
  const SlotRef streams = s.in(0, kF32Only), weights = s.in(1, kF32Only, (2 + n) * n), y = s.in(2, kF32Only);
  const SlotRef out = s.out(0, kF32Only, streams.width, streams.selected);
  if (streams.width != n * y.width || weights.selected != streams.selected || y.selected != streams.selected)
    s.refuse("in[0] of width %lld and in[2] of width %lld do not fit %lld streams", (long long)streams.width,
             (long long)y.width, (long long)n);
  s.alias_only(out, SlotRef{});
  return std::make_unique<Expand>(streams, weights, y, out, n);
}

}  // namespace dso
