// Chooses the blocks that block-sparse attention reads, for each row and kv head: sinks, window, and the best estimates of the
// middle. For a latent cache, which has the keys of one kv head, it returns the tokens of these blocks.
#include "block_schedule.hpp"
#include "cache.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class BlockChoose final : public Op {
 public:
  BlockChoose(const SlotRef& q, const SlotRef& out, std::shared_ptr<BlockSchedule> schedule, int64_t layer, bool tokens)
      : q_(q), out_(out), schedule_(std::move(schedule)), shape_(schedule_->shape), layer_(layer), tokens_(tokens) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the whole cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t scratch_bytes(const Run& run) const override { return scores_at(run) + 4 * stride(); }
  int64_t shared_bytes(const Run&) const override { return 4 * schedule_->shared_floats; }

  void task(const Run& run, int64_t index, int thread) override {
    const BlockTask& t = schedule_->tasks[index];
    if (t.kv_head < 0) return all_seen(run, t);
    uint8_t* scratch = run.thread_scratch(thread);
    const dso_cache& cache = *run.batch.source->cache;
    const Rows& q = run.slots[q_.index];
    float* estimates =
        t.part < 0 ? reinterpret_cast<float*>(scratch + estimates_at(run)) : reinterpret_cast<float*>(run.shared) + t.part;
    run.kernels.block_estimates(cache.layout(layer_), cache.view(layer_, run.batch.table(layer_, t.sequence)), t.kv_head,
                                q.f32(run.batch.first_row[t.sequence]) + t.kv_head * shape_.group() * shape_.head_dim, q.stride,
                                shape_.group(), t.r0, t.r1, schedule_->panels.data() + t.p0, t.p1 - t.p0,
                                estimates + (t.p0 - t.first) * summary_blocks, t.width, scratch);
    if (t.part >= 0 && !schedule_->countdowns.last(t.merge)) return;
    for (int64_t r = t.r0; r < t.r1; ++r, estimates += shape_.group() * t.width) choose(run, t, r, estimates, scratch);
  }

 private:
  int64_t stride() const { return round_up(schedule_->candidates, 16); }
  int64_t estimates_at(const Run& run) const { return round_up(int64_t(run.kernels.attn_scratch), 64); }
  int64_t ordered_at(const Run& run) const { return estimates_at(run) + round_up(4 * schedule_->private_floats, 64); }
  int64_t scores_at(const Run& run) const { return ordered_at(run) + 4 * stride() * shape_.group(); }
  float* row(const Run& run, const BlockTask& t, int64_t r, int64_t kv_head) const {
    return run.slots[out_.index].f32(run.batch.first_row[t.sequence] + r) + kv_head * shape_.top_k;
  }
  static int64_t token(const Run& run, const BlockTask& t, int64_t r) { return run.batch.source->context_len[t.sequence] + r; }

  void all_seen(const Run& run, const BlockTask& t) const {
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = 0; h < shape_.kv_heads; ++h) {
        float* out = row(run, t, r, h);
        for (int64_t i = 0, n = shape_.seen(token(run, t, r)); i < shape_.top_k; ++i) out[i] = i < n ? float(i) : -1.0f;
        if (tokens_) blocks_to_tokens(out, token(run, t, r));
      }
  }

  // Replaces the indices of a row's blocks by those of their tokens up to the row itself, -1 after the last; from the end
  // backwards, in place.
  void blocks_to_tokens(float* row, int64_t last) const {
    for (int64_t i = shape_.top_k - 1; i >= 0; --i) {
      const int64_t first = int64_t(row[i]) * DSO_BLOCK_TOKENS;
      for (int64_t j = 0; j < DSO_BLOCK_TOKENS; ++j)
        row[i * DSO_BLOCK_TOKENS + j] = first < 0 || first + j > last ? -1.0f : float(first + j);
    }
  }

  // Estimates are in the order of the cache's blocks; in the order of the sequence they are the row's scores.
  void choose(const Run& run, const BlockTask& t, int64_t r, const float* estimates, uint8_t* scratch) const {
    const int64_t seen = shape_.seen(token(run, t, r)), end = shape_.end(token(run, t, r)), first = shape_.first();
    const int64_t between = end - first, best = shape_.top_k - first - (seen - end);
    float *ordered = reinterpret_cast<float*>(scratch + ordered_at(run)),
          *scores = reinterpret_cast<float*>(scratch + scores_at(run));
    for (int64_t h = 0; h < shape_.group(); ++h)
      for (int64_t i = t.b0; i < t.b1 && schedule_->runs[i].block < end; ++i) {
        const BlockRun& blocks = schedule_->runs[i];
        std::copy_n(estimates + h * t.width + blocks.at, std::min(blocks.count, end - blocks.block),
                    ordered + h * stride() + blocks.block - first);
      }
    run.kernels.block_scores(ordered, stride(), shape_.group(), between, scores);
    float* out = row(run, t, r, t.kv_head);
    run.kernels.index_select(scores, between, best, out + first);
    for (int64_t i = 0; i < first; ++i) out[i] = float(i);
    for (int64_t i = first; i < first + best; ++i) out[i] += float(first);
    for (int64_t i = first + best; i < shape_.top_k; ++i) out[i] = float(end + i - first - best);
    if (tokens_) blocks_to_tokens(out, token(run, t, r));
  }

  const SlotRef q_, out_;
  const std::shared_ptr<BlockSchedule> schedule_;
  const BlockShape shape_;
  const int64_t layer_;
  const bool tokens_;
};

std::shared_ptr<BlockSchedule> block_schedule(StepReader& s, int64_t kv_heads, int64_t head_dim) {
  const dso_step& step = s.step;
  s.sees(0, 0);
  s.uses_shared();
  s.plan().needs.summaries = true;
  const BlockShape shape{s.positive("heads", step.heads), kv_heads,    head_dim,
                         s.positive("top_k", step.top_k), step.window, step.sinks};
  if (shape.heads % shape.kv_heads) s.refuse("heads %d is not a multiple of kv_heads %d", step.heads, step.kv_heads);
  if (step.window < 0 || step.sinks < 0) s.refuse("window is %d, sinks %d: neither may be negative", step.window, step.sinks);
  const int64_t sure = shape.first() + ceil_div(shape.window, DSO_BLOCK_TOKENS) + 1;
  if (sure >= shape.top_k)
    s.refuse("top_k is %d, must exceed the %lld blocks that are always chosen", step.top_k, (long long)sure);
  return shared_schedule(s.plan().block_schedules, shape);
}

}  // namespace

std::unique_ptr<Op> make_block_choose(StepReader& s) {
  const dso_step& step = s.step;
  s.takes(1, 1, 0, 0, 0);
  s.attends(step.layer, step.kv_heads, step.head_dim, false);
  auto schedule = block_schedule(s, step.kv_heads, step.head_dim);
  const SlotRef q = s.token_rows(0, int64_t(step.heads) * step.head_dim),
                out = s.out(0, kF32Only, int64_t(step.kv_heads) * step.top_k, false);
  if (out.index == q.index) s.refuse("out[0] is in[0]");
  return std::make_unique<BlockChoose>(q, out, std::move(schedule), step.layer, false);
}

std::unique_ptr<Op> make_latent_choose(StepReader& s) {
  const dso_step& step = s.step;
  s.takes(1, 1, 0, 0, 0);
  s.attends_latent(step.layer, step.rank, step.rope, false);
  const int64_t width = int64_t(step.rank) + step.rope;
  if (width > max_summary_width)
    s.refuse("latents of %lld elements: estimates support at most %lld", (long long)width, (long long)max_summary_width);
  auto schedule = block_schedule(s, 1, width);
  const SlotRef q = s.token_rows(0, step.heads * width),
                out = s.out(0, kF32Only, int64_t(step.top_k) * DSO_BLOCK_TOKENS, false);
  if (out.index == q.index) s.refuse("out[0] is in[0]");
  return std::make_unique<BlockChoose>(q, out, std::move(schedule), step.layer, true);
}

}  // namespace dso
