// Attention over the paged cache. The last task to finish a row's heads merges its chunks, and the last to finish a block of
// rows converts them for the following matrix product: neither needs a stage of its own.
#include <cmath>
#include <optional>

#include "attention_schedule.hpp"
#include "cache.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class Attention final : public Op {
 public:
  Attention(const SlotRef& q, const SlotRef& chosen, const SlotRef& out, std::shared_ptr<AttentionSchedule> schedule,
            int64_t layer, const Scores& scores)
      : q_(q),
        chosen_(chosen),
        out_(out),
        schedule_(std::move(schedule)),
        shape_(schedule_->shape),
        layer_(layer),
        scores_(scores) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the whole cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t node_end(const Run&, int node) const override { return schedule_->nodes.end(node); }
  int64_t scratch_bytes(const Run& run) const override { return private_at(run) + 4 * schedule_->private_floats; }
  int64_t shared_bytes(const Run& run) const override { return parts_at(run) + 4 * schedule_->shared_floats; }

  void task(const Run& run, int64_t index, int thread) override {
    const AttentionTask& t = schedule_->tasks[index];
    switch (t.kind) {
      case AttentionKind::kDecode:
        decode(run, t, thread);
        break;
      case AttentionKind::kPrefill:
        prefill(run, t, thread);
        break;
      case AttentionKind::kEager:
        eager(run, t, thread);
        break;
    }
  }

 private:
  int64_t chosen_at(const Run& run) const { return round_up(int64_t(run.kernels.attn_scratch), 64); }
  int64_t private_at(const Run& run) const { return chosen_at(run) + round_up(4 * shape_.top_k, 64); }
  int64_t parts_at(const Run& run) const { return shape_.converts ? run.batch.T * staging_stride() : 0; }
  int64_t staging_stride() const { return round_up(4 * out_.width, 64); }
  float* private_floats(const Run& run, int thread) const {
    return reinterpret_cast<float*>(run.thread_scratch(thread) + private_at(run));
  }

  // fp32 rows of the result: those of the slot, or staging rows.
  Rows results(const Run& run) const {
    return shape_.converts ? Rows{run.shared, staging_stride(), run.batch.T} : run.slots[out_.index];
  }
  const float* query(const Run& run, const AttentionTask& t, int64_t r) const {
    return head(run.slots[q_.index], run, t, r, t.h0);
  }
  float* result(const Run& run, const AttentionTask& t, int64_t r, int64_t h) const { return head(results(run), run, t, r, h); }
  float* head(const Rows& rows, const Run& run, const AttentionTask& t, int64_t r, int64_t h) const {
    return rows.f32(run.batch.first_row[t.sequence] + r) + (t.kv_head * shape_.group() + h) * shape_.head_dim;
  }
  // For q heads of a kv head from `h` on.
  Scores scores_of(const AttentionTask& t, int64_t h) const {
    Scores scores = scores_;
    if (scores.sinks) scores.sinks += t.kv_head * shape_.group() + h;
    return scores;
  }
  const KvLayout& layout(const Run& run) const { return run.batch.source->cache->layout(layer_); }
  KvView view(const Run& run, const AttentionTask& t) const {
    return run.batch.source->cache->view(layer_, run.batch.table(layer_, t.sequence));
  }
  std::optional<CacheCopy> copy(const Run& run, const AttentionTask& t) const {
    const dso_cache& cache = *run.batch.source->cache;
    if (cache.newest == 0) return std::nullopt;
    const int64_t layer = cache.copy_of(layer_);
    return CacheCopy{cache.layout(layer), cache.view(layer, run.batch.table(layer, t.sequence)), cache.newest};
  }

  // The tokens visible to the task's rows; with chosen blocks, those visible to row r. Whatever values the slot holds, no index
  // leads outside the sequence.
  VisibleTokens sight(const Run& run, const AttentionTask& t, int64_t r, int thread) const {
    if (shape_.top_k == 0) return shape_.sight(run.batch, t.sequence);
    const int64_t last = (run.batch.source->context_len[t.sequence] + r) / DSO_BLOCK_TOKENS,
                  n = std::min(last + 1, shape_.top_k);
    const float* from = run.slots[chosen_.index].f32(run.batch.first_row[t.sequence] + r) + t.kv_head * shape_.top_k;
    int32_t* blocks = reinterpret_cast<int32_t*>(run.thread_scratch(thread) + chosen_at(run));
    for (int64_t i = 0; i < n; ++i)
      blocks[i] = from[i] > 0 ? int32_t(std::min<int64_t>(int64_t(std::min(from[i], 2e9f)), last)) : 0;
    return {0, 0, blocks, n};
  }

  void decode(const Run& run, const AttentionTask& task, int thread) {
    AttentionTask t = task;
    for (; t.kv_head < t.kv_end; ++t.kv_head)
      if (!decode_head(run, t, thread)) return;
    finish(run, t);
  }

  // False while another task that the merge waits for is unfinished.
  bool decode_head(const Run& run, const AttentionTask& t, int thread) {
    const int64_t heads = t.h1 - t.h0, chunk_floats = (t.r1 - t.r0) * heads * shape_.part_floats();
    const int64_t context = run.batch.source->context_len[t.sequence];
    float* parts = t.part < 0 ? private_floats(run, thread) : reinterpret_cast<float*>(run.shared + parts_at(run)) + t.part;
    VisibleTokens seen = sight(run, t, t.r0, thread);
    const std::optional<CacheCopy> copy = this->copy(run, t);
    if (copy) seen.newest = copy->tokens;
    for (int64_t c = t.c0; c < t.c1; ++c) {
      seen.copied = t.chunks.is_copied(c);
      run.kernels.attn_decode_chunk(seen.copied ? copy->layout : layout(run), seen.copied ? copy->view : view(run, t),
                                    t.kv_head, query(run, t, 0), run.slots[q_.index].stride, heads, t.r0, t.r1, context, seen,
                                    scores_, t.chunks.at(c), parts + c * chunk_floats, run.thread_scratch(thread));
    }
    if (t.part >= 0 && !schedule_->last(t.merge)) return false;
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = 0; h < heads; ++h)
        run.kernels.attn_merge(parts + ((r - t.r0) * heads + h) * shape_.part_floats(), chunk_floats, t.chunks.count,
                               shape_.head_dim, scores_of(t, t.h0 + h).sinks, result(run, t, r, t.h0 + h));
    return true;
  }

  void prefill(const Run& run, const AttentionTask& t, int thread) {
    const int64_t rows = shape_.top_k > 0 ? 1 : t.r1 - t.r0;
    const std::optional<CacheCopy> copy = this->copy(run, t);
    for (int64_t r = t.r0; r < t.r1; r += rows)
      run.kernels.attn_prefill(layout(run), view(run, t), t.kv_head, query(run, t, 0), run.slots[q_.index].stride, t.h1 - t.h0,
                               r, r + rows, run.batch.source->context_len[t.sequence], sight(run, t, r, thread),
                               scores_of(t, t.h0), copy ? &*copy : nullptr, result(run, t, 0, t.h0), results(run).stride,
                               run.thread_scratch(thread));
    finish(run, t);
  }

  void eager(const Run& run, const AttentionTask& t, int thread) {
    const std::optional<CacheCopy> copy = this->copy(run, t);
    for (int64_t r = t.r0; r < t.r1; ++r) {
      const int64_t context = run.batch.source->context_len[t.sequence];
      const VisibleTokens sight = shape_.sight(run.batch, t.sequence);
      const int64_t n = sight.end(context, r), first = shape_.window > 0 ? std::max<int64_t>(0, sight.begin(context + r)) : 0;
      for (int64_t h = t.h0; h < t.h1; ++h)
        run.kernels.attn_eager(layout(run), view(run, t), t.kv_head, head(run.slots[q_.index], run, t, r, h), n, first,
                               scores_of(t, h), copy ? &*copy : nullptr, private_floats(run, thread), result(run, t, r, h));
    }
    finish(run, t);
  }

  void finish(const Run& run, const AttentionTask& t) {
    if (!shape_.converts || !schedule_->last(t.rows)) return;
    for (int64_t r = run.batch.first_row[t.sequence] + t.r0, end = r + t.r1 - t.r0; r < end; ++r)
      run.kernels.convert(out_.kind, results(run).f32(r), 0, out_.width, out_.width, run.slots[out_.index].row(r));
  }

  const SlotRef q_, chosen_, out_;
  const std::shared_ptr<AttentionSchedule> schedule_;
  const AttentionShape shape_;
  const int64_t layer_;
  const Scores scores_;  // sinks: of all heads
};

}  // namespace

std::unique_ptr<Op> make_attention(StepReader& s) {
  const dso_step& step = s.step;
  const bool eager = step.flags & DSO_FLAG_EAGER, chunked = step.flags & DSO_FLAG_CHUNKED;
  if (step.window < 0 || step.sinks < 0 || step.top_k < 0)
    s.refuse("window is %d, sinks %d, top_k %d: none may be negative", step.window, step.sinks, step.top_k);
  if (step.sinks > 0 && (step.window == 0 || eager))
    s.refuse("sinks is %d with %s", step.sinks, eager ? "the EAGER flag" : "no window");
  if (step.top_k > 0 && (step.window > 0 || eager))
    s.refuse("top_k is %d with %s", step.top_k, eager ? "the EAGER flag" : "a window");
  if (chunked && (step.window == 0 || step.sinks > 0))
    s.refuse("window is %d, sinks %d with the CHUNKED flag, which needs a window without sinks", step.window, step.sinks);
  if (!(step.softcap >= 0 && std::isfinite(step.softcap)))
    s.refuse("softcap is %g, must be finite and not negative", double(step.softcap));
  s.takes(step.top_k > 0 ? 2 : 1, 1, 1, 0, DSO_FLAG_EAGER | DSO_FLAG_CHUNKED | DSO_FLAG_CAUSAL);
  s.attends(step.layer, step.kv_heads, step.head_dim, false);
  s.sees(step.window, step.sinks);
  s.uses_shared();
  s.plan().needs.choices |= step.top_k > 0;
  const int64_t heads = s.positive("heads", s.step.heads);
  if (heads % s.step.kv_heads) s.refuse("heads %d is not a multiple of kv_heads %d", s.step.heads, s.step.kv_heads);
  const SlotRef q = s.token_rows(0, heads * step.head_dim), out = s.out(0, kAnyKind, q.width, false);
  const SlotRef chosen = step.top_k > 0 ? s.token_rows(1, int64_t(step.kv_heads) * step.top_k) : SlotRef{};
  if (out.index == q.index || out.index == chosen.index) s.refuse("out[0], slot %d, is an input", out.index);

  const Scores scores{step.scale, step.softcap, s.has_weight(0) ? s.vector('w', 0, heads) : nullptr};
  const AttentionShape shape{heads,      step.kv_heads, step.head_dim,     step.window, step.sinks,
                             step.top_k, eager,         !is_f32(out.kind), chunked,     (step.flags & DSO_FLAG_CAUSAL) != 0};
  return std::make_unique<Attention>(q, chosen, out, shared_schedule(s.plan().schedules, shape), s.step.layer, scores);
}

}  // namespace dso
