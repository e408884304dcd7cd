// Latent attention over the paged cache, in the form that the schedule chose for each sequence. In the absorbed form, the last
// task to finish a row's heads merges its pieces, without a stage of its own.
#include <limits>

#include "cache.hpp"
#include "mla_schedule.hpp"
#include "ops.hpp"

namespace dso {
namespace {

constexpr int64_t kProductRows =
    64;  // latents per product: a head's fp32 keys and values of them stay in L2 until they are stored in panels

class MlaAttention final : public Op {
 public:
  struct Slots {
    SlotRef q, absorbed, chosen, sums, out;
  };
  MlaAttention(std::shared_ptr<MlaSchedule> schedule, const Slots& slots, const Matrix& kv_b, int64_t layer, float scale)
      : schedule_(std::move(schedule)),
        shape_(schedule_->shape),
        slots_(slots),
        kv_b_(kv_b),
        kind_(finest_kind(kv_b.format)),
        layer_(layer),
        scale_(scale) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }  // never serial: it reads the whole cache
  void prepare(const Run& run) override { schedule_->build(run); }
  int64_t tasks(const Run&) const override { return int64_t(schedule_->tasks.size()); }
  int64_t scratch_bytes(const Run& run) const override {
    return std::max(parts_at(run) + 4 * schedule_->private_floats, schedule_->states > 0 ? ExpandRoom(*this, run).bytes : 0);
  }
  int64_t shared_bytes(const Run&) const override { return 4 * schedule_->shared_floats; }

  void task(const Run& run, int64_t index, int thread) override {
    const MlaTask& t = schedule_->tasks[index];
    t.expanded ? expanded(run, t, run.thread_scratch(thread)) : absorbed(run, t, run.thread_scratch(thread));
  }

 private:
  const KvLayout& layout(const Run& run) const { return run.batch.source->cache->layout(layer_); }
  int64_t queries_at(const Run& run) const { return round_up(run.kernels.mla_scratch(layout(run)), 64); }
  int64_t parts_at(const Run& run) const {
    return queries_at(run) + schedule_->queries * run.kernels.mla_query_bytes(layout(run));
  }

  int64_t rows_floats(const MlaTask& t) const {
    return (t.r1 - t.r0) * (t.h1 - t.h0) * shape_.part_floats();
  }  // per piece or group

  void absorbed(const Run& run, const MlaTask& t, uint8_t* scratch) {
    const int64_t floats = rows_floats(t), groups = t.pieces.groups();
    float *own = reinterpret_cast<float*>(scratch + parts_at(run)), *shared = reinterpret_cast<float*>(run.shared) + t.part;
    float* folded = t.parts == MlaParts::kGroups ? shared : own + t.pieces.in_group() * floats;
    pack_queries(run, t, scratch + queries_at(run));
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = t.pieces.group_begin(g), begin = std::max(first, t.p0),
                    end = std::min(t.pieces.group_begin(g + 1), t.p1);
      if (begin >= end) continue;
      for (int64_t i = begin; i < end; ++i)
        attend(run, t, i, t.parts == MlaParts::kPieces ? shared + i * floats : own + (i - first) * floats, scratch);
      if (groups > 1 && t.parts != MlaParts::kPieces)
        for (int64_t at = 0; at < floats; at += shape_.part_floats())
          run.kernels.attn_fold(own + at, floats, end - begin, shape_.rank, folded + g * floats + at);
    }
    if (t.parts != MlaParts::kAlone && !schedule_->countdowns.last(t.merge)) return;
    for (int64_t r = t.r0, at = 0; r < t.r1; ++r)
      for (int64_t h = t.h0; h < t.h1; ++h, at += shape_.part_floats()) {
        float* out = run.slots[slots_.sums.index].f32(run.batch.first_row[t.sequence] + r) + h * shape_.rank;
        const float* pieces = (t.parts == MlaParts::kPieces ? shared : own) + at;
        if (groups == 1) {
          run.kernels.attn_merge(pieces, floats, t.pieces.count(), shape_.rank, nullptr, out);
        } else if (t.parts != MlaParts::kPieces) {
          run.kernels.attn_merge(folded + at, floats, groups, shape_.rank, nullptr, out);
        } else {
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = t.pieces.group_begin(g);
            run.kernels.attn_fold(pieces + first * floats, floats, t.pieces.group_begin(g + 1) - first, shape_.rank,
                                  own + g * shape_.part_floats());
          }
          run.kernels.attn_merge(own, shape_.part_floats(), groups, shape_.rank, nullptr, out);
        }
      }
  }

  void pack_queries(const Run& run, const MlaTask& t, uint8_t* packed) const {
    const Rows& q = run.slots[slots_.absorbed.index];
    for (int64_t r = t.r0; r < t.r1; ++r)
      for (int64_t h = t.h0; h < t.h1; h += mla_heads, packed += run.kernels.mla_query_bytes(layout(run)))
        run.kernels.mla_query(layout(run), q.f32(run.batch.first_row[t.sequence] + r) + h * shape_.width(),
                              std::min(mla_heads, t.h1 - h), scale_, packed);
  }

  // One piece. Rows share what is read from the cache, and so do their heads, mla_heads at a time.
  void attend(const Run& run, const MlaTask& t, int64_t index, float* part, uint8_t* scratch) const {
    const int64_t context = run.batch.source->context_len[t.sequence], heads = t.h1 - t.h0;
    const KvView view = run.batch.source->cache->view(layer_, run.batch.table(layer_, t.sequence));
    const MlaPiece piece = t.pieces.at(index);
    int32_t chosen[attn_chunk];
    int64_t tokens = piece.tokens;
    if (t.sparse)
      tokens = read_chosen(run.slots[slots_.chosen.index].f32(run.batch.first_row[t.sequence] + t.r0) + piece.first, tokens,
                           context + t.r0, chosen);
    run.kernels.mla_tokens(layout(run), view, t.sparse ? chosen : nullptr, piece.first, tokens, scratch);
    const uint8_t* packed = scratch + queries_at(run);
    for (int64_t r = t.r0; r < t.r1; ++r, part += heads * shape_.part_floats()) {
      const auto [begin, end] = t.sparse ? std::pair<int64_t, int64_t>(0, tokens) : shape_.window.within(piece, context + r);
      for (int64_t h = 0; h < heads; h += mla_heads, packed += run.kernels.mla_query_bytes(layout(run)))
        run.kernels.mla_attend(layout(run), packed, std::min(mla_heads, heads - h), begin, end, part + h * shape_.part_floats(),
                               scratch);
    }
  }

  // Offsets in a thread's scratch, after the part that the kernels use.
  struct ExpandRoom {
    int64_t latents, numbers, kv, panels, state, bytes;
    ExpandRoom(const MlaAttention& op, const Run& run) {
      const int64_t product_columns =
          round_up(op.shape_.nope + op.shape_.v_dim, kTileRows) + kTileRows;  // a head may start inside a tile
      latents = round_up(int64_t(std::max(run.kernels.linear_scratch, run.kernels.attn_scratch)), 64);
      numbers = latents + attn_chunk * row_bytes(op.kind_, op.shape_.rank);
      kv = numbers + round_up(4 * op.shape_.rank, 64);
      panels = kv + kProductRows * 4 * product_columns;
      state = panels + round_up(run.kernels.mla_panel_bytes(op.head(run)), 64);
      bytes = state + 2 * 4 * op.schedule_->states;
    }
  };
  MlaHead head(const Run& run) const {
    return {shape_.nope, shape_.rope, shape_.v_dim, kv_b_.format == DSO_F32 && layout(run).type == DSO_KV_F32};
  }

  // Processes the chunks that a row sees, one by one; their latents are converted to rows once for all heads of the task.
  void expanded(const Run& run, const MlaTask& t, uint8_t* scratch) const {
    const ExpandRoom room(*this, run);
    const MlaHead shape = head(run);
    const int64_t row = run.batch.first_row[t.sequence], rows = t.r1 - t.r0;
    const Rows &q = run.slots[slots_.q.index], &out = run.slots[slots_.out.index];
    const VisibleTokens sight{shape_.window.window, shape_.window.sinks};
    float* state = reinterpret_cast<float*>(scratch + room.state);
    std::fill_n(state, 2 * rows * (t.h1 - t.h0), 0.0f);
    for (int64_t h = t.h0; h < t.h1; ++h) {
      std::fill_n(state + (h - t.h0) * 2 * rows, rows, -std::numeric_limits<float>::infinity());
      for (int64_t r = t.r0; r < t.r1; ++r) std::fill_n(out.f32(row + r) + h * shape_.v_dim, shape_.v_dim, 0.0f);
    }
    for (int64_t chunk = 0; chunk * attn_chunk < t.pieces.end; ++chunk) {
      const auto seen = t.pieces.blocks_of(chunk);
      if (seen[0].tokens + seen[1].tokens == 0) continue;
      const Rows latents{scratch + room.latents, row_bytes(kind_, shape_.rank), attn_chunk};
      const KvView view = run.batch.source->cache->view(layer_, run.batch.table(layer_, t.sequence));
      for (const MlaPiece& p : seen)
        if (p.tokens > 0)
          run.kernels.mla_rows(layout(run), view, p.first, p.tokens, kind_, reinterpret_cast<float*>(scratch + room.numbers),
                               latents.row(p.first % attn_chunk), latents.stride);
      for (int64_t h = t.h0; h < t.h1; ++h) {
        for (const MlaPiece& p : seen) make_panels(run, view, shape, h, p.first, p.tokens, latents, scratch, room);
        float* m = state + (h - t.h0) * 2 * rows;
        run.kernels.mla_expanded(shape, scratch + room.panels, chunk, q.f32(row) + h * shape_.head_dim(), q.stride, t.r0, t.r1,
                                 run.batch.source->context_len[t.sequence], sight, scale_, m, m + rows,
                                 out.f32(row) + h * shape_.v_dim, out.stride, scratch);
      }
    }
    for (int64_t h = t.h0; h < t.h1; ++h)
      for (int64_t r = t.r0; r < t.r1; ++r) {
        const float sum = state[((h - t.h0) * 2 + 1) * rows + r - t.r0];
        float* values = out.f32(row + r) + h * shape_.v_dim;
        for (int64_t i = 0; i < shape_.v_dim; ++i) values[i] /= sum;
      }
  }

  // Keys and values of one head: its rows of kv_b, which may start inside a tile.
  void make_panels(const Run& run, const KvView& view, const MlaHead& shape, int64_t h, int64_t first, int64_t tokens,
                   const Rows& latents, uint8_t* scratch, const ExpandRoom& room) const {
    const int64_t begin = h * (shape_.nope + shape_.v_dim), end = begin + shape_.nope + shape_.v_dim;
    const int64_t tile = begin / kTileRows, tiles = ceil_div(end, kTileRows) - tile, stride = 4 * tiles * kTileRows;
    const Matrix part = tiles_of(kv_b_, tile, tile + tiles);
    float* kv = reinterpret_cast<float*>(scratch + room.kv);
    for (int64_t i = 0; i < tokens; i += kProductRows) {
      const int64_t n = std::min(kProductRows, tokens - i);
      run.kernels.linear(part, nullptr, kind_, latents.row(first % attn_chunk + i), latents.stride, n, true, 0, tiles, kv,
                         stride, scratch);
      run.kernels.mla_panels(layout(run), view, shape, first + i, n, kv + begin - tile * kTileRows, stride,
                             scratch + room.panels);
    }
  }

  // Counts the token indices in a row of a slot, up to the first negative one. Whatever values the slot holds, no index leads
  // outside the row's sequence.
  static int64_t read_chosen(const float* from, int64_t most, int64_t last, int32_t* to) {
    int64_t n = 0;
    for (; n < most && from[n] >= 0; ++n) to[n] = int32_t(std::min<int64_t>(int64_t(std::min(from[n], 2e9f)), last));
    return n;
  }

  const std::shared_ptr<MlaSchedule> schedule_;
  const MlaShape shape_;
  const Slots slots_;
  const Matrix kv_b_;
  const int32_t kind_;  // slot kind of the latents for the product with kv_b
  const int64_t layer_;
  const float scale_;
};

}  // namespace

std::unique_ptr<Op> make_mla_attention(StepReader& s) {
  auto schedule = mla_schedule(s);
  const MlaShape& shape = schedule->shape;
  s.takes(shape.top_k > 0 ? 3 : 2, 2, 1, 0, DSO_FLAG_EXPAND);
  s.attends_latent(s.step.layer, s.step.rank, s.step.rope, false);
  s.sees(shape.window.window, shape.window.sinks);
  s.uses_shared();
  const Matrix kv_b = s.matrix(0);
  if (kv_b.rows != shape.heads * (shape.nope + shape.v_dim) || kv_b.cols != shape.rank)
    s.refuse("w[0] is %d x %d, must be %lld x %lld", kv_b.rows, kv_b.cols,
             (long long)(shape.heads * (shape.nope + shape.v_dim)), (long long)shape.rank);
  MlaAttention::Slots slots;
  slots.q = s.token_rows(0, shape.heads * shape.head_dim());
  slots.out = s.out(1, kF32Only, shape.heads * shape.v_dim, false);
  if (shape.expand) {
    if (s.step.in[1] != -1 || s.step.out[0] != -1)
      s.refuse("in[1] and out[0] are for absorbed rows and must be -1 with the EXPAND flag");
  } else {
    slots.absorbed = s.token_rows(1, shape.heads * shape.width());
    if (shape.top_k > 0) slots.chosen = s.token_rows(2, shape.top_k);
    slots.sums = s.out(0, kF32Only, shape.heads * shape.rank, false);
  }
  for (const SlotRef& out : {slots.out, slots.sums})
    for (const SlotRef& in : {slots.q, slots.absorbed, slots.chosen})
      if (out.index >= 0 && out.index == in.index) s.refuse("slot %d is both an input and an output", out.index);
  return std::make_unique<MlaAttention>(std::move(schedule), slots, kv_b, s.step.layer, s.step.scale);
}

}  // namespace dso
