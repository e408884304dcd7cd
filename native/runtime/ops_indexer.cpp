// The lightning indexer: writing its keys to the cache, and choosing the tokens that sparse attention reads.
#include "cache_write.hpp"
#include "entry_places.hpp"
#include "indexer_schedule.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class IndexChoose final : public Op {
 public:
  IndexChoose(const SlotRef& q, const SlotRef& w, const SlotRef& out, std::shared_ptr<IndexSchedule> schedule, int64_t layer,
              float scale)
      : q_(q), w_(w), out_(out), schedule_(std::move(schedule)), shape_(schedule_->shape), layer_(layer), scale_(scale) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the whole cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t scratch_bytes(const Run& run) const override { return scores_at(run) + 4 * schedule_->private_floats; }
  int64_t shared_bytes(const Run&) const override { return 4 * schedule_->shared_floats; }

  void task(const Run& run, int64_t index, int thread) override {
    const IndexTask& t = schedule_->tasks[index];
    if (t.t0 == t.t1) return all_seen(run, t);
    uint8_t* scratch = run.thread_scratch(thread);
    float* scores =
        t.part < 0 ? reinterpret_cast<float*>(scratch + scores_at(run)) : reinterpret_cast<float*>(run.shared) + t.part;
    score(run, t, scratch, scores);
    if (t.part >= 0 && !schedule_->last(t.merge)) return;
    for (int64_t r = t.r0; r < t.r1; ++r)
      run.kernels.index_select(scores + (r - t.r0) * t.stride, seen(run, t, r), shape_.top_k, row(run, out_, t, r));
  }

 private:
  int64_t query_bytes(const Run& run) const { return round_up(run.kernels.index_query_bytes(shape_.heads, shape_.index), 64); }
  int64_t scores_at(const Run& run) const { return IndexSchedule::kRows * query_bytes(run); }
  int64_t seen(const Run& run, const IndexTask& t, int64_t r) const {
    return shape_.seen(run.batch.source->context_len[t.sequence], r);
  }
  // Entries are rows of their own kind: in the layout of an indexer's keys without latents before them.
  KvLayout layout(const Run& run) const {
    KvLayout l = run.batch.source->cache->layout(layer_);
    if (l.every == 0) return l;
    l.index = l.rank;
    l.index_bytes = l.row_bytes;
    l.rank = 0;
    l.row_bytes = 0;
    return l;
  }
  static float* row(const Run& run, const SlotRef& slot, const IndexTask& t, int64_t r) {
    return run.slots[slot.index].f32(run.batch.first_row[t.sequence] + r);
  }

  void all_seen(const Run& run, const IndexTask& t) const {
    for (int64_t r = t.r0; r < t.r1; ++r) {
      float* out = row(run, out_, t, r);
      const int64_t n = seen(run, t, r);
      for (int64_t i = 0; i < shape_.top_k; ++i) out[i] = i < n ? float(i) : -1.0f;
    }
  }

  void score(const Run& run, const IndexTask& t, uint8_t* queries, float* scores) const {
    const KvView view = run.batch.source->cache->view(layer_, run.batch.table(layer_, t.sequence));
    const KvLayout layout = this->layout(run);
    const EntryPlaces places{shape_.every};
    for (int64_t r = t.r0; r < t.r1; ++r)
      run.kernels.index_query(layout, shape_.heads, row(run, q_, t, r), queries + (r - t.r0) * query_bytes(run));
    for (int64_t from = t.t0; from < t.t1; from += IndexSchedule::kTokens)
      for (int64_t r = t.r0; r < t.r1; ++r) {
        const int64_t to = std::min({from + IndexSchedule::kTokens, t.t1, seen(run, t, r)});
        float* out = scores + (r - t.r0) * t.stride;
        for (int64_t key = from; key < to;) {
          const int64_t place = places.at(key), end = std::min(to, places.end_of_run(key));
          run.kernels.index_scores(layout, view, shape_.heads, queries + (r - t.r0) * query_bytes(run), row(run, w_, t, r),
                                   place, place + end - key, scale_, out + key);
          key = end;
        }
      }
  }

  const SlotRef q_, w_, out_;
  const std::shared_ptr<IndexSchedule> schedule_;
  const IndexShape shape_;
  const int64_t layer_;
  const float scale_;
};

}  // namespace

std::unique_ptr<Op> make_index_write(StepReader& s) {
  s.takes(1, 0, 0, 0, 0);
  s.attends_index(s.step.layer, s.step.index, true);
  return std::make_unique<RowsWriter>(s.token_rows(0, s.step.index), s.step.layer, &Kernels::index_write);
}

std::unique_ptr<Op> make_index_choose(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  s.attends_index(s.step.layer, s.step.index, false);
  s.sees(0, 0);
  s.uses_shared();
  const IndexShape shape{s.positive("heads", s.step.heads), s.step.index, s.positive("top_k", s.step.top_k)};
  const SlotRef q = s.token_rows(0, shape.heads * shape.index), w = s.token_rows(1, shape.heads);
  const SlotRef out = s.out(0, kF32Only, shape.top_k, false);
  if (out.index == q.index || out.index == w.index) s.refuse("out[0], slot %d, is an input", out.index);
  return std::make_unique<IndexChoose>(q, w, out, shared_schedule(s.plan().index_schedules, shape), s.step.layer, s.step.scale);
}

std::unique_ptr<Op> make_entries_choose(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const IndexShape shape{s.positive("heads", s.step.heads), s.positive("head_dim", s.step.head_dim),
                         s.positive("top_k", s.step.top_k), s.positive("groups", s.step.groups)};
  s.attends_rows(s.step.layer, shape.index, shape.every, 0, true);
  s.uses_shared();
  const SlotRef q = s.token_rows(0, shape.heads * shape.index), w = s.token_rows(1, shape.heads);
  const SlotRef out = s.out(0, kF32Only, shape.top_k, false);
  if (out.index == q.index || out.index == w.index) s.refuse("out[0], slot %d, is an input", out.index);
  return std::make_unique<IndexChoose>(q, w, out, shared_schedule(s.plan().index_schedules, shape), s.step.layer, s.step.scale);
}

}  // namespace dso
