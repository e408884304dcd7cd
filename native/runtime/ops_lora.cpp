// The low-rank products of adapters, for consecutive rows with the same adapter at a time. LINEAR, GATE_UP and
// LINEAR_GELU add the second product themselves (add_low_rank); LORA_UP is for all other products.
#include "adapters.hpp"
#include "ops.hpp"

namespace dso {
namespace {

constexpr int64_t kUpTiles = 64;    // tiles of outputs per task of LORA_UP
constexpr int64_t kHeadsATask = 8;  // heads per task
constexpr int64_t kBlockRows = 12;  // rows that a kernel multiplies at a time

struct HeadShape {
  int64_t heads, stride, elements;  // elements of a head in its slot, and how many of them the product reads or writes
};

class Lora : public Op {
 public:
  Lora(int32_t site, const HeadShape& shape, int64_t parts)
      : site_(site), shape_(shape), parts_(parts), sets_(ceil_div(shape.heads, kHeadsATask)) {}
  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run& run) const override { return int64_t(run.batch.adapted.size()) * sets_ * parts_; }
  void task(const Run& run, int64_t index, int thread) override {
    const AdaptedRows& rows = run.batch.adapted[size_t(index / (sets_ * parts_))];
    const dso_adapters::Pair& pair = run.batch.source->adapters->pair(rows.slot, site_);
    if (pair.down.first.rows == 0) return;
    const int64_t set = index / parts_ % sets_, end = std::min((set + 1) * kHeadsATask, shape_.heads);
    for (int64_t h = set * kHeadsATask; h < end; ++h) product(run, rows, pair, h, index % parts_, thread);
  }

 protected:
  virtual void product(const Run& run, const AdaptedRows& rows, const dso_adapters::Pair& pair, int64_t head, int64_t part,
                       int thread) const = 0;
  const int32_t site_;
  const HeadShape shape_;
  const int64_t parts_, sets_;
};

class LoraDown final : public Lora {
 public:
  LoraDown(int32_t site, const HeadShape& shape, int64_t rank, const SlotRef& x, const SlotRef& h)
      : Lora(site, shape, 1), rank_(rank), x_(x), h_(h) {}
  int64_t scratch_bytes(const Run&) const override { return kBlockRows * (restored_bytes() + row_bytes(DSO_SLOT_F32, rank_)); }

 private:
  void product(const Run& run, const AdaptedRows& rows, const dso_adapters::Pair& pair, int64_t head, int64_t,
               int thread) const override {
    LowRank a = pair.down.of(head);
    a.next = next(run, rows, a, head);
    const Rows &x = run.slots[x_.index], &h = run.slots[h_.index];
    const bool as_it_is = x_.kind == h_.kind, rounded = h_.kind == DSO_SLOT_BF16;
    const Rows restored{run.thread_scratch(thread), restored_bytes(), kBlockRows};
    const Rows sums{restored.row(kBlockRows), row_bytes(DSO_SLOT_F32, rank_), kBlockRows};
    for (int64_t row = rows.first, end = rows.first + rows.count; row < end; row += kBlockRows) {
      const int64_t n = std::min(kBlockRows, end - row);
      for (int64_t i = 0; i < n && !as_it_is; ++i) run.kernels.restore(x_.kind, x.row(row + i), x_.width, restored.row(i));
      const Rows from = as_it_is ? Rows{x.row(row) + 4 * head * shape_.stride, x.stride, n} : restored;
      const Rows to = rounded ? sums : Rows{h.row(row) + 4 * head * rank_, h.stride, n};
      run.kernels.low_rank(a, h_.kind, from.data, from.stride, n, 0, ceil_div(a.rows, kTileRows), false, to.f32(0), to.stride);
      for (int64_t i = 0; i < n && rounded; ++i) run.kernels.convert(h_.kind, to.f32(i), 0, a.rows, a.rows, h.row(row + i));
      a.next = nullptr;  // fetched
    }
  }
  // Of a row that `restore` writes, in whole groups of 32.
  int64_t restored_bytes() const { return row_bytes(h_.kind, round_up(x_.width, 32)); }
  // What this thread probably reads after A: that of the adapter `threads` tasks later, if it is as large. With a few rows for
  // each adapter, reading A from memory takes longer than the product.
  const uint8_t* next(const Run& run, const AdaptedRows& rows, const LowRank& a, int64_t head) const {
    const std::vector<AdaptedRows>& adapted = run.batch.adapted;
    const size_t later = size_t(&rows - adapted.data()) + size_t(run.threads);
    if (later >= adapted.size()) return nullptr;
    const LowRank other = run.batch.source->adapters->pair(adapted[later].slot, site_).down.of(head);
    return other.rows == a.rows ? other.data : nullptr;
  }
  const int64_t rank_;
  const SlotRef x_, h_;
};

class LoraUp final : public Lora {
 public:
  LoraUp(int32_t site, const HeadShape& shape, int64_t rank, const SlotRef& h, const SlotRef& y)
      : Lora(site, shape, ceil_div(ceil_div(shape.elements, kTileRows), kUpTiles)), rank_(rank), h_(h), y_(y) {}

 private:
  void product(const Run& run, const AdaptedRows& rows, const dso_adapters::Pair& pair, int64_t head, int64_t part,
               int) const override {
    const int64_t tile = part * kUpTiles, tiles = ceil_div(shape_.elements, kTileRows);
    const Rows &h = run.slots[h_.index], &y = run.slots[y_.index];
    run.kernels.low_rank(pair.up.of(head), DSO_SLOT_F32, h.row(rows.first) + 4 * head * rank_, h.stride, rows.count, tile,
                         std::min(tile + kUpTiles, tiles), true, y.f32(rows.first) + head * shape_.stride, y.stride);
  }
  const int64_t rank_;
  const SlotRef h_, y_;
};

// The heads of a step's slot of this width: one, unless the step says otherwise.
HeadShape head_shape(StepReader& s, int64_t width) {
  if (s.step.heads == 0) return {1, width, width};
  const HeadShape shape{s.positive("heads", s.step.heads), s.positive("head_dim", s.step.head_dim),
                        s.positive("nope", s.step.nope)};
  if (shape.heads < 2 || shape.heads * shape.stride != width || shape.elements > shape.stride)
    s.refuse("heads is %d, head_dim %d and nope %d, which do not fit a slot of width %lld", s.step.heads, s.step.head_dim,
             s.step.nope, (long long)width);
  return shape;
}

}  // namespace

std::unique_ptr<Op> make_lora_down(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const SlotRef x = s.in(0, s.step.heads == 0 ? kAnyKind : kF32Only);
  if (x.selected) s.refuse("in[0], slot %d, holds selected rows", x.index);
  const HeadShape shape = head_shape(s, x.width);
  const int64_t rank = s.positive("rank", s.step.rank);
  const SlotRef h = s.out(0, kAnyKind, shape.heads * rank, false);
  if (h.kind != low_rank_kind(x.kind))
    s.refuse("out[0] is %s, must be %s for rows of %s", kind_name(h.kind), kind_name(low_rank_kind(x.kind)), kind_name(x.kind));
  s.alias_only(h, SlotRef{});
  s.adapts(s.step.index, {0, int32_t(shape.elements), int32_t(shape.heads)}, int32_t(rank));
  if (s.plan().sites_after && shape.heads == 1) s.plan().sites_after->push_back(s.step.index);
  return std::make_unique<LoraDown>(s.step.index, shape, rank, x, h);
}

std::unique_ptr<Op> make_lora_up(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const SlotRef y = s.token_rows(1);
  const HeadShape shape = head_shape(s, y.width);
  const int64_t rank = s.positive("rank", s.step.rank);
  const SlotRef h = s.token_rows(0, shape.heads * rank), out = s.out(0, kF32Only, y.width, false);
  if (out.index != y.index || h.index == y.index)
    s.refuse("out[0] is slot %d, must be in[1], slot %d, and not in[0]", out.index, y.index);
  s.adapts(s.step.index, {int32_t(shape.elements), 0, int32_t(shape.heads)}, int32_t(rank));
  return std::make_unique<LoraUp>(s.step.index, shape, rank, h, y);
}

}  // namespace dso
