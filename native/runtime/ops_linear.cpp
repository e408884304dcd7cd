// Matrix products: LINEAR (up to three matrices over one input, in one stage) and GATE_UP (SwiGLU inside the projection).
#include "linear_grid.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class Linear final : public Op {
 public:
  struct Product {
    Matrix w;
    const float* bias;
    SlotRef out;
  };
  Linear(const SlotRef& in, std::vector<Product> products) : in_(in), products_(std::move(products)) {}

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
    run.kernels.linear(p.w, p.bias, in_.kind, x.row(row), x.stride, g.end_row(task) - row, g.prefill, tile,
                       std::min(tile + g.block_tiles, tile_rows(p.w)), y.f32(row), y.stride, run.thread_scratch(thread));
  }

 private:
  struct Part {
    int64_t first_task;
    const Product* product;
    LinearGrid grid;
  };
  const SlotRef in_;
  const std::vector<Product> products_;
  std::vector<Part> parts_;
  int64_t tasks_ = 0;
};

// A task computes the same columns of gate and up in its own buffers and writes silu(gate) * up of them directly to the rows
// that the next product reads: whole groups of 32 columns, so conversion does not need another task's columns.
class GateUp final : public Op {
 public:
  GateUp(const SlotRef& in, const SlotRef& out, const Matrix& gate, const Matrix& up, const float* gate_bias,
         const float* up_bias, bool gelu)
      : in_(in), out_(out), gate_(gate), up_(up), gate_bias_(gate_bias), up_bias_(up_bias), gelu_(gelu) {}

  void shape(const Run& run) override {
    grids_ =
        cut_by_phase(gate_, in_.kind, run.slots[in_.index].count, decode_rows(run, in_), run.threads, matrix_bytes(gate_), 2);
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
  int64_t scratch_bytes(const Run& run) const override { return buffers_at(run) + 2 * 4 * block_floats_; }

  void task(const Run& run, int64_t index, int thread) override {
    index = in_stretches(index, tasks(run), run.threads);
    int i = 0;
    for (; index >= grids_.grid[i].tasks(); ++i) index -= grids_.grid[i].tasks();
    const LinearGrid& g = grids_.grid[i];
    const int64_t row = g.first_row(index), n = g.end_row(index) - row;
    const int64_t tile = g.first_tile(index), tile_end = std::min(tile + g.block_tiles, tile_rows(gate_));
    const int64_t column = tile * kTileRows, columns = std::min(tile_end * kTileRows, out_.width) - column;
    const int64_t stride = g.block_tiles * kTileRows;
    float* gate = reinterpret_cast<float*>(run.thread_scratch(thread) + buffers_at(run));
    float* up = gate + block_floats_;
    product(run, gate_, gate_bias_, g, row, n, tile, tile_end, gate, stride, thread);
    product(run, up_, up_bias_, g, row, n, tile, tile_end, up, stride, thread);
    for (int64_t r = 0; r < n; ++r) {
      float* h = gate + r * stride;
      (gelu_ ? run.kernels.geglu : run.kernels.swiglu)(h, up + r * stride, columns, h);
      write_columns(run, out_, row + r, h, column, column + columns);
    }
  }

 private:
  int64_t buffers_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }
  // linear() writes at the matrix's own columns: the buffer starts at the task's first column.
  void product(const Run& run, const Matrix& w, const float* bias, const LinearGrid& g, int64_t row, int64_t n, int64_t tile,
               int64_t tile_end, float* buffer, int64_t stride, int thread) const {
    const Rows& x = run.slots[in_.index];
    run.kernels.linear(tiles_of(w, tile, tile_end), bias ? bias + tile * kTileRows : nullptr, in_.kind, x.row(row), x.stride, n,
                       g.prefill, 0, tile_end - tile, buffer, 4 * stride, run.thread_scratch(thread));
  }

  const SlotRef in_, out_;
  const Matrix gate_, up_;
  const float *gate_bias_, *up_bias_;
  const bool gelu_;
  PhaseGrids grids_;
  int64_t block_floats_ = 0;
};

}  // namespace

std::unique_ptr<Op> make_linear(StepReader& s) {
  int n = 1;
  while (n < 3 && s.step.w[n] != -1) ++n;
  s.takes(1, n, n, n, 0);
  std::vector<Linear::Product> products;
  SlotRef in;
  for (int i = 0; i < n; ++i) {
    const Matrix w = s.matrix(i);
    if (i == 0) in = s.activations(w);
    if (w.cols != in.width) s.refuse("w[%d] has %d columns, but in[0] has width %lld", i, w.cols, (long long)in.width);
    if (!reads(w.format, in.kind))
      s.refuse("in[0] is %s, which the %s weights of w[%d] do not support", kind_name(in.kind), format_name(w.format), i);
    const SlotRef out = s.out(i, kF32Only, w.rows, in.selected);
    if (out.index == in.index) s.refuse("out[%d] is in[0]", i);
    products.push_back({w, s.bias(i, w.rows), out});
  }
  return std::make_unique<Linear>(in, std::move(products));
}

std::unique_ptr<Op> make_gate_up(StepReader& s) {
  s.takes(1, 1, 2, 2, DSO_FLAG_GELU);
  const Matrix gate = s.matrix(0), up = s.matrix(1);
  if (gate.format != up.format || gate.rows != up.rows || gate.cols != up.cols)
    s.refuse("w[0] is %s of %d x %d, w[1] is %s of %d x %d: they must be equal", format_name(gate.format), gate.rows, gate.cols,
             format_name(up.format), up.rows, up.cols);
  const SlotRef in = s.activations(gate), out = s.out(0, kAnyKind, gate.rows, in.selected);
  if (out.index == in.index) s.refuse("out[0] is in[0]");
  return std::make_unique<GateUp>(in, out, gate, up, s.bias(0, gate.rows), s.bias(1, gate.rows), s.step.flags & DSO_FLAG_GELU);
}

}  // namespace dso
