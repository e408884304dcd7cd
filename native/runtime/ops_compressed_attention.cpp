// Compressed attention: all heads over a window of rows and over entries, which are keys and values. A task is up to 16 heads
// of a few rows of one sequence and some pieces, each up to 256 rows of the cache; pieces begin at multiples of 256 tokens or
// entries, or of 256 chosen entries, so that a row's bits do not depend on the batch. Entries are chosen for each row, which is
// then a task of its own.
#include <algorithm>
#include <cmath>

#include "cache.hpp"
#include "countdown.hpp"
#include "entry_places.hpp"
#include "ops.hpp"

namespace dso {
namespace {

struct Shape {
  int64_t heads, head_dim, window, every, top_k;  // every 0: no entries; top_k 0: they are not chosen
  int64_t part_floats() const { return head_dim + 16; }
};

struct Piece {
  bool of_entries;
  int64_t first, count;  // tokens, entries, or places in the list of chosen entries
};

struct RowsTask {
  int64_t sequence, h0, h1, r0, r1;  // h0: a multiple of mla_heads; rows within the sequence
  int64_t p0, p1, pieces;            // its pieces, of all that the rows see
  int64_t part;                      // offset of all pieces' results in the shared memory, in floats; -1: it has all pieces
  int32_t merge;
};

class CompressedAttention final : public Op {
 public:
  struct Slots {
    SlotRef q, chosen, out;
  };
  CompressedAttention(const Slots& slots, const Shape& shape, int64_t layer, int64_t entries, float scale, const float* sinks)
      : slots_(slots), shape_(shape), layer_(layer), entries_(entries), scale_(scale), sinks_(sinks) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the cache
  int64_t tasks(const Run&) const override { return int64_t(tasks_.size()); }
  int64_t scratch_bytes(const Run& run) const override { return parts_at(run) + 4 * private_floats_; }
  int64_t shared_bytes(const Run&) const override { return 4 * shared_floats_; }

  void prepare(const Run& run) override {
    if (built_ == run.batch.serial) return;
    built_ = run.batch.serial;
    tasks_.clear();
    private_floats_ = shared_floats_ = 0;
    const dso_batch& b = *run.batch.source;
    const int64_t rows = shape_.top_k > 0 ? 1 : kRows, head_groups = ceil_div(shape_.heads, mla_heads);
    int64_t whole = 0;  // tasks, if each has all pieces
    for (int64_t s = 0; s < b.S; ++s) whole += ceil_div(b.query_len[s], rows) * head_groups;
    const bool split = whole < kTasksAThread * run.threads && run.threads > 1;
    countdowns_.reset(split ? size_t(whole) : 0);
    for (int64_t s = 0; s < b.S; ++s)
      for (int64_t r = 0; r < b.query_len[s]; r += rows)
        for (int64_t h = 0; h < shape_.heads; h += mla_heads)
          add({s, h, std::min(h + mla_heads, shape_.heads), r, std::min<int64_t>(r + rows, b.query_len[s]), 0, 0, 0, -1, -1},
              b.context_len[s], split);
  }

  void task(const Run& run, int64_t index, int thread) override {
    const RowsTask& t = tasks_[size_t(index)];
    const int64_t heads = t.h1 - t.h0, floats = (t.r1 - t.r0) * heads * shape_.part_floats();
    uint8_t* scratch = run.thread_scratch(thread);
    float* parts =
        t.part < 0 ? reinterpret_cast<float*>(scratch + parts_at(run)) : reinterpret_cast<float*>(run.shared) + t.part;
    pack_queries(run, t, scratch + queries_at(run));
    for (int64_t i = t.p0; i < t.p1; ++i) attend(run, t, i, parts + i * floats, scratch);
    if (t.part >= 0 && !countdowns_.last(t.merge)) return;
    for (int64_t r = t.r0, at = 0; r < t.r1; ++r)
      for (int64_t h = t.h0; h < t.h1; ++h, at += shape_.part_floats())
        run.kernels.attn_merge(parts + at, floats, t.pieces, shape_.head_dim, sinks_ + h,
                               run.slots[slots_.out.index].f32(run.batch.first_row[t.sequence] + r) + h * shape_.head_dim);
  }

 private:
  static constexpr int64_t kRows = 4;          // of a task, where entries are not chosen
  static constexpr int64_t kTasksAThread = 4;  // with fewer tasks, each has one piece

  void add(RowsTask t, int64_t context, bool split) {
    t.pieces = window_pieces(t, context) + entry_pieces(t, context);
    t.p1 = t.pieces;
    const int64_t floats = t.pieces * (t.r1 - t.r0) * (t.h1 - t.h0) * shape_.part_floats();
    if (!split || t.pieces == 1) {
      private_floats_ = std::max(private_floats_, floats);
      tasks_.push_back(t);
      return;
    }
    t.part = shared_floats_;
    shared_floats_ += floats;
    t.merge = countdowns_.add(int32_t(t.pieces));
    for (int64_t i = 0; i < t.pieces; ++i) {
      t.p0 = i;
      t.p1 = i + 1;
      tasks_.push_back(t);
    }
  }

  int64_t window_begin(const RowsTask& t, int64_t context) const {
    return std::max<int64_t>(0, context + t.r0 + 1 - shape_.window);
  }
  int64_t window_pieces(const RowsTask& t, int64_t context) const {
    return (context + t.r1 - 1) / attn_chunk - window_begin(t, context) / attn_chunk + 1;
  }
  // Entries that the last of the rows sees, or places for as many as are chosen of these.
  int64_t entries_of(const RowsTask& t, int64_t context) const {
    if (shape_.every == 0) return 0;
    const int64_t seen = (context + t.r1) / shape_.every;
    return shape_.top_k > 0 ? std::min(seen, shape_.top_k) : seen;
  }
  int64_t entry_pieces(const RowsTask& t, int64_t context) const { return ceil_div(entries_of(t, context), attn_chunk); }

  Piece piece(const RowsTask& t, int64_t context, int64_t index) const {
    const int64_t begin = window_begin(t, context), first = begin / attn_chunk + index, windows = window_pieces(t, context);
    if (index < windows) {
      const int64_t from = std::max(begin, first * attn_chunk), to = std::min(context + t.r1, (first + 1) * attn_chunk);
      return {false, from, to - from};
    }
    const int64_t from = (index - windows) * attn_chunk;
    return {true, from, std::min(attn_chunk, entries_of(t, context) - from)};
  }

  void pack_queries(const Run& run, const RowsTask& t, uint8_t* packed) const {
    const KvLayout& l = layout(run, layer_);
    for (int64_t r = t.r0; r < t.r1; ++r, packed += run.kernels.mla_query_bytes(l))
      run.kernels.mla_query(l, run.slots[slots_.q.index].f32(run.batch.first_row[t.sequence] + r) + t.h0 * shape_.head_dim,
                            t.h1 - t.h0, scale_, packed);
  }

  void attend(const Run& run, const RowsTask& t, int64_t index, float* part, uint8_t* scratch) const {
    const int64_t context = run.batch.source->context_len[t.sequence], heads = t.h1 - t.h0;
    const Piece p = piece(t, context, index);
    const int64_t kind = p.of_entries ? entries_ : layer_;
    const KvLayout& l = layout(run, kind);
    const KvView view = run.batch.source->cache->view(kind, run.batch.table(kind, t.sequence));
    int32_t places[attn_chunk];
    int64_t count = p.count;
    if (p.of_entries) count = places_of(run, t, context, p, places);
    run.kernels.mla_tokens(l, view, p.of_entries ? places : nullptr, p.first, count, scratch);
    const uint8_t* packed = scratch + queries_at(run);
    for (int64_t r = t.r0; r < t.r1; ++r, packed += run.kernels.mla_query_bytes(l), part += heads * shape_.part_floats()) {
      const int64_t i = context + r;  // the row's token
      int64_t begin = 0, end = count;
      if (!p.of_entries) {
        begin = std::max<int64_t>(0, i + 1 - shape_.window - p.first);
        end = std::min(count, i + 1 - p.first);
      } else if (shape_.top_k == 0) {
        end = std::min(count, (i + 1) / shape_.every - p.first);
      }
      run.kernels.mla_attend(l, packed, heads, begin, end, part, scratch);
    }
  }

  // Places of a piece's entries in the cache; returns their number. Whatever values the slot of chosen ones holds, no place
  // leads outside the sequence.
  int64_t places_of(const Run& run, const RowsTask& t, int64_t context, const Piece& p, int32_t* places) const {
    const EntryPlaces at{shape_.every};
    int64_t n = 0;
    if (shape_.top_k == 0) {
      for (; n < p.count; ++n) places[n] = int32_t(at.at(p.first + n));
      return n;
    }
    const float* chosen = run.slots[slots_.chosen.index].f32(run.batch.first_row[t.sequence] + t.r0) + p.first;
    const int64_t last = (context + t.r1) / shape_.every - 1;
    for (; n < p.count && chosen[n] >= 0; ++n)
      places[n] = int32_t(at.at(std::min<int64_t>(int64_t(std::min(chosen[n], 2e9f)), last)));
    return n;
  }

  static const KvLayout& layout(const Run& run, int64_t kind) { return run.batch.source->cache->layout(kind); }
  int64_t queries_at(const Run& run) const { return round_up(run.kernels.mla_scratch(layout(run, layer_)), 64); }
  int64_t parts_at(const Run& run) const { return queries_at(run) + kRows * run.kernels.mla_query_bytes(layout(run, layer_)); }

  const Slots slots_;
  const Shape shape_;
  const int64_t layer_, entries_;
  const float scale_;
  const float* sinks_;  // per head
  std::vector<RowsTask> tasks_;
  int64_t private_floats_ = 0, shared_floats_ = 0, built_ = 0;
  Countdowns countdowns_;
};

}  // namespace

std::unique_ptr<Op> make_compressed_attention(StepReader& s) {
  const bool has_entries = s.step.index >= 0, chooses = s.step.in[1] >= 0;
  s.takes(2, 1, 1, 0, 0);
  Shape shape{s.positive("heads", s.step.heads), s.positive("head_dim", s.step.head_dim), s.positive("window", s.step.window),
              has_entries ? s.positive("groups", s.step.groups) : 0, 0};
  if (chooses && !has_entries) s.refuse("in[1] has chosen entries, but index is -1");
  CompressedAttention::Slots slots;
  slots.q = s.token_rows(0, shape.heads * shape.head_dim);
  if (chooses) {
    slots.chosen = s.token_rows(1);
    shape.top_k = slots.chosen.width;
  }
  slots.out = s.out(0, kF32Only, slots.q.width, false);
  s.alias_only(slots.out, SlotRef{});
  s.attends_rows(s.step.layer, shape.head_dim, 1, shape.window, false);
  if (has_entries) s.attends_rows(s.step.index, shape.head_dim, shape.every, 0, false);
  s.uses_shared();
  return std::make_unique<CompressedAttention>(slots, shape, s.step.layer, s.step.index, s.step.scale,
                                               s.vector('w', 0, shape.heads));
}

}  // namespace dso
