// The blocks that block-sparse attention reads, for each row and kv head: sinks, window, and the best estimates between.
#include "block_schedule.hpp"
#include "cache.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class BlockChoose final : public Op {
 public:
  BlockChoose(const SlotRef& q, const SlotRef& out, std::shared_ptr<BlockSchedule> schedule, int64_t layer)
      : q_(q), out_(out), schedule_(std::move(schedule)), shape_(schedule_->shape), layer_(layer) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t scratch_bytes(const Run& run) const override { return scores_at(run) + 4 * stride(); }

  void task(const Run& run, int64_t index, int thread) override {
    const BlockTask& t = schedule_->tasks[index];
    if (t.kv_head < 0) return all_seen(run, t);
    uint8_t* scratch = run.thread_scratch(thread);
    const dso_cache& cache = *run.batch.source->cache;
    const Rows& q = run.slots[q_.index];
    const int64_t width = (t.p1 - t.p0) * summary_blocks;
    float* estimates = reinterpret_cast<float*>(scratch + estimates_at(run));
    run.kernels.block_estimates(cache.layout, cache.view(layer_, run.batch.table(t.sequence)), t.kv_head,
                                q.f32(run.batch.first_row[t.sequence]) + t.kv_head * shape_.group() * shape_.head_dim, q.stride, shape_.group(), t.r0, t.r1,
                                schedule_->panels.data() + t.p0, t.p1 - t.p0, estimates, width, scratch);
    for (int64_t r = t.r0; r < t.r1; ++r, estimates += shape_.group() * width) choose(run, t, r, estimates, width, scratch);
  }

 private:
  int64_t stride() const { return round_up(schedule_->candidates, 16); }
  int64_t estimates_at(const Run& run) const { return round_up(int64_t(run.kernels.attn_scratch), 64); }
  int64_t ordered_at(const Run& run) const { return estimates_at(run) + round_up(4 * schedule_->estimates, 64); }
  int64_t scores_at(const Run& run) const { return ordered_at(run) + 4 * stride() * shape_.group(); }
  float* row(const Run& run, const BlockTask& t, int64_t r, int64_t kv_head) const {
    return run.slots[out_.index].f32(run.batch.first_row[t.sequence] + r) + kv_head * shape_.top_k;
  }
  static int64_t token(const Run& run, const BlockTask& t, int64_t r) { return run.batch.source->context_len[t.sequence] + r; }

  void all_seen(const Run& run, const BlockTask& t) const {
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = 0; h < shape_.kv_heads; ++h)
        for (int64_t i = 0, n = shape_.seen(token(run, t, r)); i < shape_.top_k; ++i) row(run, t, r, h)[i] = i < n ? float(i) : -1.0f;
  }

  // Estimates lie as the cache's blocks do; in the sequence's order they make the row's scores.
  void choose(const Run& run, const BlockTask& t, int64_t r, const float* estimates, int64_t width, uint8_t* scratch) const {
    const int64_t seen = shape_.seen(token(run, t, r)), end = shape_.end(token(run, t, r)), first = shape_.first();
    const int64_t between = end - first, best = shape_.top_k - first - (seen - end);
    float *ordered = reinterpret_cast<float*>(scratch + ordered_at(run)), *scores = reinterpret_cast<float*>(scratch + scores_at(run));
    for (int64_t h = 0; h < shape_.group(); ++h)
      for (int64_t i = t.b0; i < t.b1 && schedule_->runs[i].block < end; ++i) {
        const BlockRun& blocks = schedule_->runs[i];
        std::copy_n(estimates + h * width + blocks.at, std::min(blocks.count, end - blocks.block), ordered + h * stride() + blocks.block - first);
      }
    run.kernels.block_scores(ordered, stride(), shape_.group(), between, scores);
    float* out = row(run, t, r, t.kv_head);
    run.kernels.index_select(scores, between, best, out + first);
    for (int64_t i = 0; i < first; ++i) out[i] = float(i);
    for (int64_t i = first; i < first + best; ++i) out[i] += float(first);
    for (int64_t i = first + best; i < shape_.top_k; ++i) out[i] = float(end + i - first - best);
  }

  const SlotRef q_, out_;
  const std::shared_ptr<BlockSchedule> schedule_;
  const BlockShape shape_;
  const int64_t layer_;
};

}  // namespace

std::unique_ptr<Op> make_block_choose(StepReader& s) {
  const dso_step& step = s.step;
  s.takes(1, 1, 0, 0, 0);
  s.attends(step.layer, step.kv_heads, step.head_dim, false);
  s.sees(0, 0);
  s.plan().needs.summaries = true;
  const BlockShape shape{s.positive("heads", step.heads), step.kv_heads, step.head_dim, s.positive("top_k", step.top_k), step.window, step.sinks};
  if (shape.heads % shape.kv_heads) s.refuse("heads %d is no multiple of kv_heads %d", step.heads, step.kv_heads);
  if (step.window < 0 || step.sinks < 0) s.refuse("window is %d, sinks %d", step.window, step.sinks);
  const int64_t sure = shape.first() + ceil_div(shape.window, DSO_BLOCK_TOKENS) + 1;
  if (sure >= shape.top_k) s.refuse("top_k is %d, and %lld blocks are always chosen", step.top_k, (long long)sure);
  const SlotRef q = s.token_rows(0, shape.heads * shape.head_dim), out = s.out(0, kF32Only, shape.kv_heads * shape.top_k, false);
  if (out.index == q.index) s.refuse("out[0] is in[0]");
  return std::make_unique<BlockChoose>(q, out, shared_schedule(s.plan().block_schedules, shape), step.layer);
}

}  // namespace dso
