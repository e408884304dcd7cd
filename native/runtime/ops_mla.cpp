// The products around absorbed attention: from queries to the latent space, and from sums of latents to values, head by head.
#include <numeric>

#include "linear_grid.hpp"
#include "mla_schedule.hpp"
#include "ops.hpp"

namespace dso {
namespace {

constexpr int64_t kRows = 64;  // rows per task: a head's weights are read once for them

// Tasks of some heads and some rows of one form and phase.
class HeadsOp : public Op {
 public:
  // together: heads are split in multiples of it. expanded: rows of the expanded form also get tasks.
  HeadsOp(std::shared_ptr<MlaSchedule> schedule, const Stack& w, int64_t together, bool expanded)
      : schedule_(std::move(schedule)), shape_(schedule_->shape), w_(w), together_(together), expanded_(expanded) {}

  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }
  bool idle(const Run&) const override { return false; }  // the form of a row changes from run to run
  void prepare(const Run& run) override {
    schedule_->build(run);
    blocks_.clear();
    for (const RowRange& range : schedule_->ranges) {
      if (range.expanded && !expanded_) continue;
      for (int64_t r = range.begin; r < range.end; r += kRows)
        blocks_.push_back({r, std::min(r + kRows, range.end), range.decode, range.expanded});
    }
    const int64_t wanted = ceil_div(kTasksAThread * run.threads, std::max<int64_t>(1, blocks_.size()));
    const int64_t step = round_up(ceil_div(shape_.heads, wanted), together_);
    heads_.clear();
    nodes_.clear();
    for (int k = 0; k < run.places.nodes_count(); ++k) {
      const Range own = run.places.of_node(k, shape_.heads, together_);
      for (int64_t h = own.begin; h < own.end; h += step) heads_.push_back({h, std::min(h + step, own.end)});
      nodes_.add(int64_t(heads_.size() * blocks_.size()));
    }
  }
  int64_t tasks(const Run&) const override { return nodes_.total(); }
  int64_t node_end(const Run&, int node) const override { return nodes_.end(node); }
  void weights_of_nodes(const ThreadPlaces& places, std::vector<NodeRange>& out) const override {
    for (int k = 0; k < places.nodes_count(); ++k) {
      const Range own = places.of_node(k, shape_.heads, together_);
      if (own.size() > 0) out.push_back({w_.at(own.begin).data, own.size() * w_.bytes, k});
    }
  }
  void task(const Run& run, int64_t index, int thread) override {
    const int64_t blocks = int64_t(blocks_.size());
    const auto [begin, end] = heads_[size_t(index / blocks)];
    block(run, blocks_[index % blocks], begin, end, thread);
  }

 protected:
  virtual void block(const Run& run, const RowRange& rows, int64_t h0, int64_t h1, int thread) = 0;

  // Columns of fp32 rows in the kind that the weights read: in place, or converted in scratch.
  Rows read(const Run& run, const Rows& from, const RowRange& rows, int64_t column, int32_t kind, uint8_t* scratch) const {
    if (kind == DSO_SLOT_F32)
      return {reinterpret_cast<uint8_t*>(from.f32(rows.begin) + column), from.stride, rows.end - rows.begin};
    const Rows converted{scratch, row_bytes(kind, w_.first.cols), rows.end - rows.begin};
    for (int64_t i = 0; i < converted.count; ++i)
      run.kernels.convert(kind, from.f32(rows.begin + i) + column, 0, w_.first.cols, w_.first.cols, converted.row(i));
    return converted;
  }
  void product(const Run& run, int64_t head, int32_t kind, const Rows& x, bool decode, float* y, int64_t y_stride,
               int thread) const {
    const Matrix w = w_.at(head);
    run.kernels.linear(w, nullptr, kind, x.data, x.stride, x.count, !decode, 0, tile_rows(w), y, y_stride,
                       run.thread_scratch(thread));
  }
  int64_t converted_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }

  const std::shared_ptr<MlaSchedule> schedule_;
  const MlaShape shape_;
  const Stack w_;

 private:
  const int64_t together_;
  const bool expanded_;
  std::vector<RowRange> blocks_;
  std::vector<Range> heads_;  // of a task, in the order of the nodes
  NodeTasks nodes_;
};

class Absorb final : public HeadsOp {
 public:
  Absorb(std::shared_ptr<MlaSchedule> schedule, const Stack& w, const SlotRef& q, const SlotRef& out)
      : HeadsOp(std::move(schedule), w, 1, false), q_(q), out_(out), kind_(finest_kind(w.first.format)) {}
  int64_t scratch_bytes(const Run& run) const override {
    return converted_at(run) + kRows * row_bytes(DSO_SLOT_BF16, shape_.nope);
  }

 private:
  void block(const Run& run, const RowRange& rows, int64_t h0, int64_t h1, int thread) override {
    const Rows &q = run.slots[q_.index], &out = run.slots[out_.index];
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t from = h * shape_.head_dim(), to = h * shape_.width();
      const Rows x = read(run, q, rows, from, kind_, run.thread_scratch(thread) + converted_at(run));
      product(run, h, kind_, x, rows.decode, out.f32(rows.begin) + to, out.stride, thread);
      for (int64_t r = rows.begin; r < rows.end; ++r)
        std::copy_n(q.f32(r) + from + shape_.nope, shape_.rope, out.f32(r) + to + shape_.rank);
    }
  }
  const SlotRef q_, out_;
  const int32_t kind_;
};

class Value final : public HeadsOp {
 public:
  Value(std::shared_ptr<MlaSchedule> schedule, const Stack& w, int32_t kind, const SlotRef& sums, const SlotRef& expanded,
        const SlotRef& out)
      // Whole groups of 32 columns, so that conversion does not need another task's columns.
      : HeadsOp(std::move(schedule), w, is_f32(out.kind) ? 1 : 32 / std::gcd<int64_t>(32, w.first.rows), true),
        kind_(kind),
        sums_(sums),
        expanded_(expanded),
        out_(out) {}
  int64_t scratch_bytes(const Run& run) const override { return values_at(run) + kRows * 4 * out_.width; }

 private:
  int64_t values_at(const Run& run) const { return converted_at(run) + kRows * row_bytes(kind_, shape_.rank); }

  void block(const Run& run, const RowRange& rows, int64_t h0, int64_t h1, int thread) override {
    const int64_t column = h0 * shape_.v_dim, end = h1 * shape_.v_dim, n = rows.end - rows.begin;
    Rows values{run.thread_scratch(thread) + values_at(run), 4 * (end - column), n};  // columns [column, end)
    const Rows& out = run.slots[out_.index];
    if (rows.expanded) {
      const Rows& made = run.slots[expanded_.index];
      values = {reinterpret_cast<uint8_t*>(made.f32(rows.begin) + column), made.stride, n};
    } else {
      if (is_f32(out_.kind)) values = {reinterpret_cast<uint8_t*>(out.f32(rows.begin) + column), out.stride, n};
      for (int64_t h = h0; h < h1; ++h) {
        const Rows x =
            read(run, run.slots[sums_.index], rows, h * shape_.rank, kind_, run.thread_scratch(thread) + converted_at(run));
        product(run, h, kind_, x, rows.decode, values.f32(0) + (h - h0) * shape_.v_dim, values.stride, thread);
      }
      if (is_f32(out_.kind)) return;
    }
    for (int64_t i = 0; i < n; ++i) write_columns(run, out_, rows.begin + i, values.f32(i), column, end);
  }
  const int32_t kind_;
  const SlotRef sums_, expanded_, out_;
};

Stack heads_stack(StepReader& s, const MlaShape& shape, int64_t rows, int64_t cols) {
  const Stack w = s.stack(0, shape.heads);
  if (w.first.rows != rows || w.first.cols != cols)
    s.refuse("w[0] has matrices of %d x %d, must be %lld x %lld", w.first.rows, w.first.cols, (long long)rows, (long long)cols);
  return w;
}

}  // namespace

std::unique_ptr<Op> make_mla_absorb(StepReader& s) {
  s.takes(1, 1, 1, 0, 0);
  auto schedule = mla_schedule(s);
  const MlaShape& shape = schedule->shape;
  const Stack w = heads_stack(s, shape, shape.rank, shape.nope);
  if (w.first.format != DSO_F32 && w.first.format != DSO_BF16)
    s.refuse("w[0] is %s, must be F32 or BF16", format_name(w.first.format));
  const SlotRef q = s.token_rows(0, shape.heads * shape.head_dim()),
                out = s.out(0, kF32Only, shape.heads * shape.width(), false);
  if (out.index == q.index) s.refuse("out[0] is in[0]");
  return std::make_unique<Absorb>(std::move(schedule), w, q, out);
}

std::unique_ptr<Op> make_mla_value(StepReader& s) {
  s.takes(2, 1, 1, 0, 0);
  auto schedule = mla_schedule(s);
  const MlaShape& shape = schedule->shape;
  const Stack w = heads_stack(s, shape, shape.v_dim, shape.rank);
  const int32_t kind = finest_kind(w.first.format);
  const SlotRef sums = s.token_rows(0, shape.heads * shape.rank), expanded = s.token_rows(1, shape.heads * shape.v_dim);
  const SlotRef out = s.out(0, kAnyKind, expanded.width, false);
  if (out.index == sums.index || out.index == expanded.index) s.refuse("out[0] is an input");
  return std::make_unique<Value>(std::move(schedule), w, kind, sums, expanded, out);
}

}  // namespace dso
