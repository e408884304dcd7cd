// Bidirectional attention of encoders: every sequence is complete in the step, so keys and values are read from slots.
#include <algorithm>

#include "../kernels/train_attention.hpp"
#include "dso_train.h"
#include "ops.hpp"

namespace dso {
namespace {

// Queries of a task: each task copies all keys of its sequence, which then takes one or two percent of its time.
constexpr int64_t kQueries = 1536;

class EncoderAttention final : public Op {
 public:
  struct Shape {
    int64_t heads, kv_heads, head_dim, window;
    float scale;
    int64_t group() const { return heads / kv_heads; }
  };

  EncoderAttention(const SlotRef& q, const SlotRef& k, const SlotRef& v, const SlotRef& out, const Shape& shape)
      : q_(q), k_(k), v_(v), out_(out), shape_(shape) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return int64_t(tasks_.size()); }
  int64_t scratch_bytes(const Run& run) const override {
    const dso_batch& b = *run.batch.source;
    const int64_t longest = *std::max_element(b.query_len, b.query_len + b.S);
    return run.kernels.train_attention->forward_scratch(sizes(0, longest, longest));
  }

  void prepare(const Run& run) override {
    tasks_.clear();
    const dso_batch& b = *run.batch.source;
    int64_t total = 0;
    for (int64_t s = 0; s < b.S; ++s) total += cost(b.query_len[s], b.query_len[s]) * shape_.kv_heads;
    const int64_t fair = std::max<int64_t>(1, total / (8 * run.threads));
    for (int64_t s = 0; s < b.S; ++s) {
      const int64_t tokens = b.query_len[s];
      const int64_t step = std::max(4 * train_attn_block, round_up(kQueries / shape_.group(), train_attn_block));
      const int64_t heads = std::clamp<int64_t>(fair / cost(tokens, tokens), 1, shape_.kv_heads);  // of a short sequence
      for (int64_t h = 0; h < shape_.kv_heads; h += heads)
        for (int64_t begin = 0; begin < tokens; begin += step) {
          const int64_t end = std::min(begin + step, tokens), h1 = std::min(h + heads, shape_.kv_heads);
          tasks_.push_back({s, h, h1, begin, end, cost(end - begin, tokens) * (h1 - h)});
        }
    }
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  }

  void task(const Run& run, int64_t index, int thread) override {
    const Task& t = tasks_[size_t(index)];
    for (int64_t h = t.h0; h < t.h1; ++h)
      run.kernels.train_attention->forward(kernel_task(run, t, h), run.thread_scratch(thread));
  }

 private:
  struct Task {
    int64_t sequence, h0, h1;  // kv heads [h0, h1)
    int64_t begin, end;        // rows of the sequence
    int64_t cost;
  };

  int64_t cost(int64_t queries, int64_t tokens) const {
    const int64_t seen = shape_.window > 0 ? std::min(tokens, 2 * shape_.window + 1) : tokens;
    return queries * seen * shape_.group();
  }

  // Queries [begin, end) of a sequence, without addresses.
  TrainAttnTask sizes(int64_t begin, int64_t end, int64_t tokens) const {
    TrainAttnTask task{};
    task.type = DSO_TYPE_F32;
    task.tokens = tokens;
    task.qk_width = task.v_width = shape_.head_dim;
    task.group = shape_.group();
    task.scale = shape_.scale;
    task.window = shape_.window < tokens ? shape_.window : 0;
    task.bidirectional = true;
    task.begin = begin;
    task.end = end;
    return task;
  }
  // One kv head of a task.
  TrainAttnTask kernel_task(const Run& run, const Task& t, int64_t head) const {
    const int64_t first = run.batch.first_row[size_t(t.sequence)], d = shape_.head_dim;
    const auto rows = [&](const SlotRef& s, int64_t h) -> void* { return run.slots[s.index].f32(first) + h * d; };
    const auto stride = [&](const SlotRef& s) { return run.slots[s.index].stride / 4; };
    TrainAttnTask task = sizes(t.begin, t.end, run.batch.source->query_len[t.sequence]);
    task.q = {rows(q_, head * shape_.group()), stride(q_), d};
    task.k = {rows(k_, head), stride(k_), d};
    task.v = {rows(v_, head), stride(v_), d};
    task.o = {rows(out_, head * shape_.group()), stride(out_), d};
    return task;
  }

  const SlotRef q_, k_, v_, out_;
  const Shape shape_;
  std::vector<Task> tasks_;
};

}  // namespace

std::unique_ptr<Op> make_encoder_attention(StepReader& s) {
  const dso_step& step = s.step;
  s.takes(3, 1, 0, 0, 0);
  const int64_t heads = s.positive("heads", step.heads), kv_heads = s.positive("kv_heads", step.kv_heads);
  const int64_t head_dim = s.positive("head_dim", step.head_dim);
  if (heads % kv_heads) s.refuse("heads %d is not a multiple of kv_heads %d", step.heads, step.kv_heads);
  if (!is_head_dim(head_dim) || head_dim > train_attn_width)
    s.refuse("head_dim is %d; it must be even and at most %lld", step.head_dim, (long long)train_attn_width);
  if (step.window < 0) s.refuse("window is %d, must not be negative", step.window);
  s.plan().needs.whole_sequences = true;
  const SlotRef q = s.token_rows(0, heads * head_dim), k = s.token_rows(1, kv_heads * head_dim),
                v = s.token_rows(2, kv_heads * head_dim), out = s.out(0, kF32Only, q.width, false);
  s.alias_only(out, SlotRef{});
  return std::make_unique<EncoderAttention>(q, k, v, out,
                                            EncoderAttention::Shape{heads, kv_heads, head_dim, step.window, step.scale});
}

}  // namespace dso
