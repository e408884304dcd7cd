// Steps with a recurrent state: short convolutions and the gated delta rule. A task has some columns of one sequence: it copies
// their state to the first slot that the batch wants them in, passes its rows over it, and goes on from there to the next slot.
#include <cmath>
#include <cstring>

#include "ops.hpp"
#include "states.hpp"

namespace dso {
namespace {

// Consecutive tiles [begin, end) of one state.
struct Tiles {
  int64_t state, begin, end;
};

// Calls pass(first row, rows, tiles) for the rows of a sequence from one target to the next; `tiles` then holds the state
// before these rows, and is to be left with the one after them.
template <class Pass>
void for_targets(const Run& run, int64_t sequence, const Tiles& tiles, const Pass& pass) {
  const dso_batch& b = *run.batch.source;
  const dso_states& states = *b.recurrent;
  const int64_t bytes = 4 * states.tile_floats[tiles.state] * (tiles.end - tiles.begin);
  const float* source = b.state_from[sequence] < 0 ? nullptr : states.tile(b.state_from[sequence], tiles.state, tiles.begin);
  int64_t row = run.batch.first_row[sequence];
  for (int64_t i = run.batch.first_target[sequence]; i < run.batch.first_target[sequence + 1]; ++i) {
    float* target = states.tile(b.state_to[2 * i + 1], tiles.state, tiles.begin);
    if (!source)
      std::memset(target, 0, bytes);
    else if (target != source)
      std::memcpy(target, source, bytes);
    const int64_t end = b.state_to[2 * i] + 1;
    pass(row, end - row, target);
    source = target;
    row = end;
  }
}

class ShortConv final : public Op {
 public:
  ShortConv(const SlotRef& in, const SlotRef& out, const float* weight, const float* bias, int64_t taps, bool silu,
            int64_t state)
      : in_(in), out_(out), weight_(weight), bias_(bias), taps_(taps), silu_(silu), state_(state) {}

  void shape(const Run&) override {}
  int64_t work(const Run& run) const override { return run.batch.T * in_.width * taps_; }
  int64_t tasks(const Run& run) const override { return run.batch.source->S * parts(); }
  void task(const Run& run, int64_t index, int) override {
    const int64_t sequence = index / parts(), first = index % parts() * kTiles;
    const int64_t end = std::min(first + kTiles, ceil_div(in_.width, state_cols));
    const Rows &x = run.slots[in_.index], &y = run.slots[out_.index];
    for_targets(run, sequence, {state_, first, end}, [&](int64_t row, int64_t rows, float* tiles) {
      for (int64_t t = first; t < end; ++t, tiles += (taps_ - 1) * state_cols) {
        const int64_t column = t * state_cols, cols = std::min(state_cols, in_.width - column);
        run.kernels.short_conv(x.f32(row) + column, x.stride, rows, cols, weight_ + column, 4 * in_.width,
                               bias_ ? bias_ + column : nullptr, taps_, silu_, tiles, y.f32(row) + column, y.stride);
      }
    });
  }

 private:
  static constexpr int64_t kTiles = 16;  // of a task
  int64_t parts() const { return ceil_div(ceil_div(in_.width, state_cols), kTiles); }

  const SlotRef in_, out_;
  const float *weight_, *bias_;
  const int64_t taps_;
  const bool silu_;
  const int64_t state_;
};

struct DeltaShape {
  int64_t heads, k_heads, k_dim, v_dim;
  bool channels;                                           // a decay for each row of a state
  int64_t decays() const { return channels ? k_dim : 1; }  // per head
  int64_t keys() const { return k_heads * k_dim; }
};

class DeltaRule final : public Op {  // a task is one head of one sequence
 public:
  DeltaRule(const SlotRef& in, const SlotRef& a, const SlotRef& b, const SlotRef& out, const float* a_log, const float* dt_bias,
            const DeltaShape& shape, int64_t state)
      : in_(in), a_(a), b_(b), out_(out), a_log_(a_log), dt_bias_(dt_bias), s_(shape), state_(state) {}

  void shape(const Run&) override {}
  int64_t work(const Run& run) const override { return run.batch.T * s_.heads * s_.k_dim * s_.v_dim; }
  int64_t tasks(const Run& run) const override { return run.batch.source->S * s_.heads; }
  int64_t scratch_bytes(const Run&) const override { return 4 * kRows * (2 * s_.k_dim + s_.decays() + 1); }
  void task(const Run& run, int64_t index, int thread) override {
    const int64_t sequence = index / s_.heads, head = index % s_.heads, tiles = ceil_div(s_.v_dim, state_cols);
    for_targets(run, sequence, {state_, head * tiles, (head + 1) * tiles}, [&](int64_t row, int64_t rows, float* state) {
      for (int64_t done = 0; done < rows; done += kRows)
        chunk(run, head, row + done, std::min(kRows, rows - done), state, reinterpret_cast<float*>(run.thread_scratch(thread)));
    });
  }

 private:
  static constexpr int64_t kRows = 32;  // rows that pass a tile while it is in the first cache

  void chunk(const Run& run, int64_t head, int64_t row, int64_t rows, float* state, float* scratch) const {
    float *q = scratch, *k = q + kRows * s_.k_dim, *decay = k + kRows * s_.k_dim, *rate = decay + kRows * s_.decays();
    const Rows &x = run.slots[in_.index], &y = run.slots[out_.index];
    const int64_t shared = head / (s_.heads / s_.k_heads) * s_.k_dim, n = s_.decays();
    for (int64_t r = 0; r < rows; ++r) {
      const float* given = x.f32(row + r);
      run.kernels.unit_length(given + shared, s_.k_dim, 1.0f / std::sqrt(float(s_.k_dim)), q + r * s_.k_dim);
      run.kernels.unit_length(given + s_.keys() + shared, s_.k_dim, 1.0f, k + r * s_.k_dim);
      const float *a = run.slots[a_.index].f32(row + r) + head * n, *bias = dt_bias_ + head * n;
      for (int64_t i = 0; i < n; ++i) {
        const double step = double(a[i]) + bias[i], softplus = step > 20 ? step : std::log1p(std::exp(step));
        decay[r * n + i] = float(std::exp(-std::exp(double(a_log_[head])) * softplus));
      }
      rate[r] = float(1 / (1 + std::exp(-double(run.slots[b_.index].f32(row + r)[head]))));
    }
    for (int64_t column = 0; column < s_.v_dim; column += state_cols, state += s_.k_dim * state_cols) {
      const int64_t at = head * s_.v_dim + column;
      run.kernels.delta_rule(q, k, x.f32(row) + 2 * s_.keys() + at, x.stride, rows, s_.k_dim,
                             std::min(state_cols, s_.v_dim - column), decay, rate, s_.channels, state, y.f32(row) + at,
                             y.stride);
    }
  }

  const SlotRef in_, a_, b_, out_;
  const float *a_log_, *dt_bias_;
  const DeltaShape s_;
  const int64_t state_;
};

}  // namespace

std::unique_ptr<Op> make_short_conv(StepReader& s) {
  s.takes(1, 1, 1, 1, DSO_FLAG_SILU);
  const SlotRef in = s.token_rows(0), out = s.out(0, kF32Only, in.width, false);
  const int64_t taps = s.positive("window", s.step.window);
  if (taps < 2) s.refuse("window is %lld, must be at least 2", (long long)taps);
  s.alias_only(out, SlotRef{});
  const float* weight = s.vector('w', 0, taps * in.width);
  return std::make_unique<ShortConv>(in, out, weight, s.bias(0, in.width), taps, s.step.flags & DSO_FLAG_SILU,
                                     s.has_state(1, taps - 1, in.width));
}

std::unique_ptr<Op> make_delta_rule(StepReader& s) {
  s.takes(3, 1, 2, 0, DSO_FLAG_CHANNELS);
  const DeltaShape shape{s.positive("heads", s.step.heads), s.positive("kv_heads", s.step.kv_heads),
                         s.positive("head_dim", s.step.head_dim), s.positive("v_dim", s.step.v_dim),
                         (s.step.flags & DSO_FLAG_CHANNELS) != 0};
  if (shape.heads % shape.k_heads) s.refuse("kv_heads, %d, does not divide heads, %d", s.step.kv_heads, s.step.heads);
  const SlotRef in = s.token_rows(0, 2 * shape.keys() + shape.heads * shape.v_dim),
                a = s.token_rows(1, shape.heads * shape.decays()), b = s.token_rows(2, shape.heads),
                out = s.out(0, kF32Only, shape.heads * shape.v_dim, false);
  s.alias_only(out, SlotRef{});
  return std::make_unique<DeltaRule>(in, a, b, out, s.vector('w', 0, shape.heads),
                                     s.vector('w', 1, shape.heads * shape.decays()), shape,
                                     s.has_state(shape.heads, shape.k_dim, shape.v_dim));
}

}  // namespace dso
