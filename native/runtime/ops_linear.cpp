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
    nodes_.clear();
    int64_t tasks = 0;
    for (int k = 0; k < run.places.nodes_count(); ++k) {
      int64_t bytes = 0;
      for (const Product& p : products_) bytes += tiles_of_node(run.places, k, p.w).size() * tile_row_bytes(p.w);
      for (const Product& p : products_) {
        const Range tiles = tiles_of_node(run.places, k, p.w);
        if (tiles.size() == 0) continue;
        const PhaseGrids grids = cut_by_phase(tiles_of(p.w, tiles.begin, tiles.end), in_.kind, run.slots[in_.index].count,
                                              decode_rows(run, in_), run.places.nodes[size_t(k)].threads, bytes);
        for (int i = 0; i < grids.count; ++i) {
          parts_.push_back({tasks, &p, grids.grid[i], tiles});
          tasks += grids.grid[i].tasks();
        }
      }
      nodes_.add(tasks);
    }
  }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return nodes_.total(); }
  int64_t node_end(const Run&, int node) const override { return nodes_.end(node); }
  void weights_of_nodes(const ThreadPlaces& places, std::vector<NodeRange>& out) const override {
    for (const Product& p : products_) add_weights(places, {p.w, 1, 0}, out);
  }
  int64_t scratch_bytes(const Run& run) const override { return int64_t(run.kernels.linear_scratch); }

  void task(const Run& run, int64_t index, int thread) override {
    index = nodes_.in_stretches(run.places, index);
    size_t i = parts_.size() - 1;
    while (parts_[i].first_task > index) --i;
    const Part& part = parts_[i];
    const Product& p = *part.product;
    const LinearGrid& g = part.grid;
    const int64_t task = index - part.first_task, row = g.first_row(task), tile = part.tiles.begin + g.first_tile(task);
    const Rows &x = run.slots[in_.index], &y = run.slots[p.out.index];
    const int64_t tile_end = std::min(tile + g.block_tiles, part.tiles.end);
    if (p.site >= 0) prefetch_low_rank(run, p.site, row, g.end_row(task), tile, tile_end);
    const DownFetches fetches(run, *sites_after_, index, nodes_.total());
    run.kernels.linear(fetches.beside(p.w), p.bias, in_.kind, x.row(row), x.stride, g.end_row(task) - row, g.prefill, tile,
                       tile_end, y.f32(row), y.stride, run.thread_scratch(thread));
    if (p.site >= 0)
      add_low_rank(run, p.site, p.h, row, g.end_row(task), tile, tile_end, y.f32(row) + tile * kTileRows, y.stride);
  }

 private:
  struct Part {
    int64_t first_task;
    const Product* product;
    LinearGrid grid;  // of these tiles
    Range tiles;
  };
  const SlotRef in_;
  const std::vector<Product> products_;
  const std::shared_ptr<const std::vector<int32_t>> sites_after_;
  std::vector<Part> parts_;
  NodeTasks nodes_;
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
    parts_.clear();
    nodes_.clear();
    block_floats_ = 0;
    int64_t tasks = 0;
    for (int k = 0; k < run.places.nodes_count(); ++k) {
      const Range tiles = tiles_of_node(run.places, k, w);
      const Matrix own = tiles_of(w, tiles.begin, tiles.end);
      const PhaseGrids grids = tiles.size() == 0
                                   ? PhaseGrids{}
                                   : cut_by_phase(own, in_.kind, run.slots[in_.index].count, decode_rows(run, in_),
                                                  run.places.nodes[size_t(k)].threads, matrix_bytes(own), 2);
      for (int i = 0; i < grids.count; ++i) {
        const LinearGrid& g = grids.grid[i];  // block_tiles is even: groups of 32 columns stay whole
        block_floats_ = std::max(block_floats_, g.block_rows * g.block_tiles * kTileRows);
        parts_.push_back({tasks, g, tiles});
        tasks += g.tasks();
      }
      nodes_.add(tasks);
    }
  }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return nodes_.total(); }
  int64_t node_end(const Run&, int node) const override { return nodes_.end(node); }
  void weights_of_nodes(const ThreadPlaces& places, std::vector<NodeRange>& out) const override {
    for (const Product& p : products_) add_weights(places, {p.w, 1, 0}, out);
  }
  int64_t scratch_bytes(const Run& run) const override {
    return buffers_at(run) + int64_t(products_.size()) * 4 * block_floats_;
  }

  void task(const Run& run, int64_t index, int thread) override {
    const int64_t count = tasks(run), task = nodes_.in_stretches(run.places, index);
    size_t i = parts_.size() - 1;
    while (parts_[i].first_task > task) --i;
    const LinearGrid& g = parts_[i].grid;
    index = task - parts_[i].first_task;
    const int64_t row = g.first_row(index), n = g.end_row(index) - row;
    const int64_t tile = parts_[i].tiles.begin + g.first_tile(index),
                  tile_end = std::min(tile + g.block_tiles, parts_[i].tiles.end);
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
  struct Part {
    int64_t first_task;
    LinearGrid grid;  // of these tiles
    Range tiles;
  };
  std::vector<Part> parts_;
  NodeTasks nodes_;
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
