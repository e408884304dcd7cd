// Latent attention over the paged cache, in the form that the schedule chose for each sequence. The last task to finish a row's
// heads merges its chunks: that costs no stage.
#include "cache.hpp"
#include "mla_schedule.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class MlaAttention final : public Op {
 public:
  MlaAttention(std::shared_ptr<MlaSchedule> schedule, const SlotRef& absorbed, const SlotRef& chosen, const SlotRef& sums, int64_t layer, float scale)
      : schedule_(std::move(schedule)), shape_(schedule_->shape), absorbed_(absorbed), chosen_(chosen), sums_(sums), layer_(layer), scale_(scale) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t scratch_bytes(const Run& run) const override { return parts_at(run) + 4 * schedule_->private_floats; }
  int64_t shared_bytes(const Run&) const override { return 4 * schedule_->shared_floats; }

  void task(const Run& run, int64_t index, int thread) override { absorbed(run, schedule_->tasks[index], run.thread_scratch(thread)); }

 private:
  const KvLayout& layout(const Run& run) const { return run.batch.source->cache->layout; }
  int64_t queries_at(const Run& run) const { return round_up(run.kernels.mla_scratch(layout(run)), 64); }
  int64_t parts_at(const Run& run) const { return queries_at(run) + schedule_->queries * run.kernels.mla_query_bytes(layout(run)); }

  // Rows share what is read of the cache, and so do their heads, mla_heads at a time.
  void absorbed(const Run& run, const MlaTask& t, uint8_t* scratch) {
    const int64_t context = run.batch.source->context_len[t.sequence], row = run.batch.first_row[t.sequence];
    const int64_t heads = t.h1 - t.h0, chunk_floats = (t.r1 - t.r0) * heads * shape_.part_floats();
    const int64_t query_bytes = run.kernels.mla_query_bytes(layout(run));
    const KvView view = run.batch.source->cache->view(layer_, run.batch.table(t.sequence));
    float* parts = t.part < 0 ? reinterpret_cast<float*>(scratch + parts_at(run)) : reinterpret_cast<float*>(run.shared) + t.part;

    uint8_t* packed = scratch + queries_at(run);
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = t.h0; h < t.h1; h += mla_heads, packed += query_bytes)
        run.kernels.mla_query(layout(run), run.slots[absorbed_.index].f32(row + r) + h * shape_.width(), std::min(mla_heads, t.h1 - h), scale_, packed);
    for (int64_t c = t.c0; c < t.c1; ++c) {
      const int64_t first = c * attn_chunk, tokens = std::min(attn_chunk, (t.sparse ? shape_.top_k : context + t.r1) - first);
      int32_t chosen[attn_chunk];
      if (t.sparse) read_chosen(run.slots[chosen_.index].f32(row + t.r0) + first, tokens, context + t.r0, chosen);
      run.kernels.mla_tokens(layout(run), view, t.sparse ? chosen : nullptr, first, tokens, scratch);
      float* part = parts + c * chunk_floats;
      packed = scratch + queries_at(run);
      for (int64_t r = t.r0; r < t.r1; ++r, part += heads * shape_.part_floats())
        for (int64_t h = 0; h < heads; h += mla_heads, packed += query_bytes)
          run.kernels.mla_attend(layout(run), packed, std::min(mla_heads, heads - h), t.sparse ? tokens : std::min(attn_chunk, context + r + 1 - first),
                                 part + h * shape_.part_floats(), scratch);
    }
    if (t.part >= 0 && !schedule_->countdowns.last(t.merge)) return;
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = t.h0; h < t.h1; ++h)
        run.kernels.attn_merge(parts + ((r - t.r0) * heads + h - t.h0) * shape_.part_floats(), chunk_floats, t.chunks, shape_.rank,
                               run.slots[sums_.index].f32(row + r) + h * shape_.rank);
  }

  // Numbers of tokens as they travel between steps. Whatever a slot may hold, none leads outside the row's sequence.
  static void read_chosen(const float* from, int64_t n, int64_t last, int32_t* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] > 0 ? int32_t(std::min<int64_t>(int64_t(std::min(from[i], 2e9f)), last)) : 0;
  }

  const std::shared_ptr<MlaSchedule> schedule_;
  const MlaShape shape_;
  const SlotRef absorbed_, chosen_, sums_;
  const int64_t layer_;
  const float scale_;
};

SlotRef token_rows(StepReader& s, int i, int64_t width) {
  const SlotRef slot = s.in(i, kF32Only, width);
  if (slot.selected) s.refuse("in[%d], slot %d, holds selected rows", i, slot.index);
  return slot;
}

}  // namespace

std::unique_ptr<Op> make_mla_attention(StepReader& s) {
  auto schedule = mla_schedule(s);
  const MlaShape& shape = schedule->shape;
  s.takes(shape.top_k > 0 ? 3 : 2, 2, 1, 0, 0);
  s.attends_latent(s.step.layer, s.step.rank, s.step.rope, false);
  s.uses_shared();
  const Matrix kv_b = s.matrix(0);
  if (kv_b.rows != shape.heads * (shape.nope + shape.v_dim) || kv_b.cols != shape.rank)
    s.refuse("w[0] is %d x %d, not %lld x %lld", kv_b.rows, kv_b.cols, (long long)(shape.heads * (shape.nope + shape.v_dim)), (long long)shape.rank);
  token_rows(s, 0, shape.heads * shape.head_dim());
  const SlotRef absorbed = token_rows(s, 1, shape.heads * shape.width());
  const SlotRef chosen = shape.top_k > 0 ? token_rows(s, 2, shape.top_k) : SlotRef{};
  const SlotRef sums = s.out(0, kF32Only, shape.heads * shape.rank, false);
  s.out(1, kF32Only, shape.heads * shape.v_dim, false);
  if (sums.index == absorbed.index) s.refuse("out[0] is in[1]");
  return std::make_unique<MlaAttention>(std::move(schedule), absorbed, chosen, sums, s.step.layer, s.step.scale);
}

}  // namespace dso
