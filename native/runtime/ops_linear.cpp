// Matrix products: LINEAR (up to three matrices over one input, in one stage), and GATE_UP and LINEAR_GELU, with an activation
// of the results.
#include "adapters.hpp"
#include "linear_grid.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class Linear final : public Op {
 public:
  struct Product {
    Matrix w;
    const float* bias;
    SlotRef out, h;  // h: what LORA_DOWN computed for `site`
    int32_t site;    // -1: no adapters
  };
  // sites_after: of the LORA_DOWN steps up to the next product with adapters.
  Linear(const SlotRef& in, std::vector<Product> products, std::shared_ptr<const std::vector<int32_t>> sites_after)
      : in_(in), products_(std::move(products)), sites_after_(std::move(sites_after)) {}

  void shape(const Run& run) override {
    parts_.clear();
    tasks_ = 0;
    int64_t bytes = 0;
    for (const Product& p : products_) bytes += matrix_bytes(p.w);
    for (const Product& p : products_) {
      const PhaseGrids grids =
          cut_by_phase(p.w, in_.kind, run.slots[in_.index].count, decode_rows(run, in_), run.threads, bytes);
      for (int i = 0; i < grids.count; ++i) {
        parts_.push_back({tasks_, &p, grids.grid[i]});
        tasks_ += grids.grid[i].tasks();
      }
    }
  }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return tasks_; }
  int64_t scratch_bytes(const Run& run) const override { return int64_t(run.kernels.linear_scratch); }

  void task(const Run& run, int64_t index, int thread) override {
    index = in_stretches(index, tasks_, run.threads);
    size_t i = parts_.size() - 1;
    while (parts_[i].first_task > index) --i;
    const Part& part = parts_[i];
    const Product& p = *part.product;
    const LinearGrid& g = part.grid;
    const int64_t task = index - part.first_task, row = g.first_row(task), tile = g.first_tile(task);
    const Rows &x = run.slots[in_.index], &y = run.slots[p.out.index];
    const int64_t tile_end = std::min(tile + g.block_tiles, tile_rows(p.w));
    if (p.site >= 0) prefetch_low_rank(run, p.site, row, g.end_row(task), tile, tile_end);
    const DownFetches fetches(run, *sites_after_, index, tasks_);
    run.kernels.linear(fetches.beside(p.w), p.bias, in_.kind, x.row(row), x.stride, g.end_row(task) - row, g.prefill, tile,
                       tile_end, y.f32(row), y.stride, run.thread_scratch(thread));
    if (p.site >= 0)
      add_low_rank(run, p.site, p.h, row, g.end_row(task), tile, tile_end, y.f32(row) + tile * kTileRows, y.stride);
  }

 private:
  struct Part {
    int64_t first_task;
    const Product* product;
    LinearGrid grid;
  };
  const SlotRef in_;
  const std::vector<Product> products_;
  const std::shared_ptr<const std::vector<int32_t>> sites_after_;
  std::vector<Part> parts_;
  int64_t tasks_ = 0;
};

// Products followed by an element-wise op: of the result of one, or of the results of two with equal shapes. A task computes
// its columns of each in its own buffers and writes the activation of them directly to the rows that the next product reads:
// whole groups of 32 columns, so conversion does not need another task's columns.
class Activated final : public Op {
 public:
  struct Product {
    Matrix w;
    const float* bias;
    SlotRef h;  // as for Linear
    int32_t site;
  };
  Activated(const SlotRef& in, const SlotRef& out, std::vector<Product> products, const ElementwiseOp& activation,
            std::shared_ptr<const std::vector<int32_t>> sites_after)
      : in_(in), out_(out), products_(std::move(products)), activation_(activation), sites_after_(std::move(sites_after)) {}

  void shape(const Run& run) override {
    const Matrix& w = products_[0].w;
    grids_ = cut_by_phase(w, in_.kind, run.slots[in_.index].count, decode_rows(run, in_), run.threads, matrix_bytes(w), 2);
    block_floats_ = 0;
    for (int i = 0; i < grids_.count; ++i) {
      const LinearGrid& g = grids_.grid[i];  // block_tiles is even: groups of 32 columns stay whole
      block_floats_ = std::max(block_floats_, g.block_rows * g.block_tiles * kTileRows);
    }
  }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override {
    int64_t n = 0;
    for (int i = 0; i < grids_.count; ++i) n += grids_.grid[i].tasks();
    return n;
  }
  int64_t scratch_bytes(const Run& run) const override {
    return buffers_at(run) + int64_t(products_.size()) * 4 * block_floats_;
  }

  void task(const Run& run, int64_t index, int thread) override {
    const int64_t count = tasks(run), task = in_stretches(index, count, run.threads);
    index = task;
    int i = 0;
    for (; index >= grids_.grid[i].tasks(); ++i) index -= grids_.grid[i].tasks();
    const LinearGrid& g = grids_.grid[i];
    const int64_t row = g.first_row(index), n = g.end_row(index) - row;
    const int64_t tile = g.first_tile(index), tile_end = std::min(tile + g.block_tiles, tile_rows(products_[0].w));
    const int64_t column = tile * kTileRows, columns = std::min(tile_end * kTileRows, out_.width) - column;
    const int64_t stride = g.block_tiles * kTileRows;
    float* const first = reinterpret_cast<float*>(run.thread_scratch(thread) + buffers_at(run));
    float* const second = products_.size() > 1 ? first + block_floats_ : nullptr;
    const auto parts = static_cast<int64_t>(products_.size());
    for (int64_t p = 0; p < parts; ++p)
      product(run, products_[p], g, row, n, tile, tile_end, {run, *sites_after_, parts * task + p, parts * count},
              first + p * block_floats_, stride, thread);
    for (int64_t r = 0; r < n; ++r) {
      float* h = first + r * stride;
      activation_.row(h, second ? second + r * stride : nullptr, columns, 0, h);
      write_columns(run, out_, row + r, h, column, column + columns);
    }
  }

 private:
  int64_t buffers_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }
  // linear() writes at the matrix's own columns: the buffer starts at the task's first column.
  void product(const Run& run, const Product& p, const LinearGrid& g, int64_t row, int64_t n, int64_t tile, int64_t tile_end,
               const DownFetches& fetches, float* buffer, int64_t stride, int thread) const {
    const Rows& x = run.slots[in_.index];
    if (p.site >= 0) prefetch_low_rank(run, p.site, row, row + n, tile, tile_end);
    run.kernels.linear(fetches.beside(tiles_of(p.w, tile, tile_end)), p.bias ? p.bias + tile * kTileRows : nullptr, in_.kind,
                       x.row(row), x.stride, n, g.prefill, 0, tile_end - tile, buffer, 4 * stride, run.thread_scratch(thread));
    if (p.site >= 0) add_low_rank(run, p.site, p.h, row, row + n, tile, tile_end, buffer, 4 * stride);
  }

  const SlotRef in_, out_;
  const std::vector<Product> products_;
  const ElementwiseOp& activation_;
  const std::shared_ptr<const std::vector<int32_t>> sites_after_;
  PhaseGrids grids_;
  int64_t block_floats_ = 0;
};

// The result of LORA_DOWN for product i of the step, which reads rows `x` and has `rows` outputs.
SlotRef low_rank_rows(StepReader& s, int i, const SlotRef& x, int32_t rows) {
  const SlotRef h = s.in(1 + i, kAnyKind);
  if (h.kind != low_rank_kind(x.kind) || h.selected)
    s.refuse("in[%d] must be %s, not selected, for rows of %s", 1 + i, kind_name(low_rank_kind(x.kind)), kind_name(x.kind));
  s.adapts(s.step.index + i, {rows, 0, 1}, int32_t(h.width));
  return h;
}

// A list that later LORA_DOWN steps will enter their sites in, if the product adds what adapters do.
std::shared_ptr<const std::vector<int32_t>> sites_after(StepReader& s, bool adapts) {
  auto sites = std::make_shared<std::vector<int32_t>>();
  if (adapts) s.plan().sites_after = sites;
  return sites;
}

// A step of one or two products, all of the same shape, and an activation.
std::unique_ptr<Op> make_activated(StepReader& s, int count, int32_t activation) {
  const bool adapts = s.step.in[1] != -1;
  s.takes(adapts ? 1 + count : 1, 1, count, count, DSO_FLAG_GELU);
  const Matrix w = s.matrix(0);
  const SlotRef in = s.activations(w), out = s.out(0, kAnyKind, w.rows, in.selected);
  if (out.index == in.index) s.refuse("out[0] is in[0]");
  if (adapts && in.selected) s.refuse("in[0] holds selected rows, which have no adapters");
  std::vector<Activated::Product> products;
  for (int i = 0; i < count; ++i) {
    SlotRef h;
    if (adapts) h = low_rank_rows(s, i, in, w.rows);
    products.push_back({s.matrix(i), s.bias(i, w.rows), h, adapts ? s.step.index + i : -1});
  }
  s.alias_only(out, SlotRef{});
  return std::make_unique<Activated>(in, out, std::move(products), elementwise_op(s.plan().kernels, activation),
                                     sites_after(s, adapts));
}

}  // namespace

std::unique_ptr<Op> make_linear(StepReader& s) {
  int n = 1;
  while (n < 3 && s.step.w[n] != -1) ++n;
  const bool adapts = s.step.in[1] != -1;
  s.takes(adapts ? 1 + n : 1, n, n, n, 0);
  std::vector<Linear::Product> products;
  SlotRef in;
  for (int i = 0; i < n; ++i) {
    const Matrix w = s.matrix(i);
    if (i == 0) in = s.activations(w);
    if (w.cols != in.width) s.refuse("w[%d] has %d columns, but in[0] has width %lld", i, w.cols, (long long)in.width);
    if (!reads(w.format, in.kind))
      s.refuse("in[0] is %s, which the %s weights of w[%d] do not support", kind_name(in.kind), format_name(w.format), i);
    SlotRef h;
    if (adapts) h = low_rank_rows(s, i, in, w.rows);
    const SlotRef out = s.out(i, kF32Only, w.rows, in.selected);
    if (out.index == in.index) s.refuse("out[%d] is in[0]", i);
    products.push_back({w, s.bias(i, w.rows), out, h, adapts ? s.step.index + i : -1});
  }
  if (adapts && in.selected) s.refuse("in[0] holds selected rows, which have no adapters");
  for (const Linear::Product& p : products) s.alias_only(p.out, SlotRef{});
  return std::make_unique<Linear>(in, std::move(products), sites_after(s, adapts));
}

std::unique_ptr<Op> make_gate_up(StepReader& s) {
  const Matrix gate = s.matrix(0), up = s.matrix(1);
  if (gate.format != up.format || gate.rows != up.rows || gate.cols != up.cols)
    s.refuse("w[0] is %s of %d x %d, w[1] is %s of %d x %d: they must be equal", format_name(gate.format), gate.rows, gate.cols,
             format_name(up.format), up.rows, up.cols);
  return make_activated(s, 2, s.step.flags & DSO_FLAG_GELU ? DSO_OP_GEGLU : DSO_OP_SWIGLU);
}

std::unique_ptr<Op> make_linear_gelu(StepReader& s) {
  return make_activated(s, 1, s.step.flags & DSO_FLAG_GELU ? DSO_OP_GELU : DSO_OP_GELU_ERF);
}

}  // namespace dso
