// GROUPED_LINEAR: one product for each group of columns, with its own rows of the matrix or with all of them.
#include "linear_grid.hpp"
#include "ops.hpp"

namespace dso {
namespace {

// With a shared matrix, the groups of a token are rows of one product, so that the weights are read once. Otherwise each group
// has tasks of its own.
class GroupedLinear final : public Op {
 public:
  GroupedLinear(const SlotRef& in, const SlotRef& out, const Matrix& w, int64_t groups, bool shared)
      : in_(in),
        out_(out),
        w_(w),
        kind_(finest_kind(w.format)),
        groups_(groups),
        products_(shared ? 1 : groups),
        rows_(w.rows / products_) {}

  void shape(const Run& run) override {
    // A group may begin and end inside a tile, so it touches one more than its rows fill.
    const int64_t tiles = ceil_div(rows_, kTileRows) + (rows_ % kTileRows ? 1 : 0);
    const Matrix one{w_.format, int32_t(tiles * kTileRows), w_.cols, w_.data};
    const int64_t each = groups_ / products_;
    grids_ = cut_by_phase(one, kind_, each * run.slots[in_.index].count, each * decode_rows(run, in_), run.threads,
                          matrix_bytes(w_));
    in_group_ = 0;
    for (int i = 0; i < grids_.count; ++i) in_group_ += grids_.grid[i].tasks();
  }
  int64_t work(const Run&) const override { return kSerialWork; }
  int64_t tasks(const Run&) const override { return products_ * in_group_; }
  int64_t scratch_bytes(const Run& run) const override {
    return converted_at(run) + block_rows() * (row_bytes(kind_, w_.cols) + 4 * block_tiles() * kTileRows);
  }

  void task(const Run& run, int64_t index, int thread) override {
    const int64_t product = index / in_group_;
    int64_t task = index % in_group_;
    int i = 0;
    while (task >= grids_.grid[i].tasks()) task -= grids_.grid[i++].tasks();
    const LinearGrid& g = grids_.grid[i];
    const int64_t begin = product * rows_, end = begin + rows_, tile = begin / kTileRows + g.first_tile(task),
                  tile_end = std::min(tile + g.block_tiles, ceil_div(end, kTileRows));
    if (tile >= tile_end) return;
    uint8_t* scratch = run.thread_scratch(thread);
    const int64_t row = g.first_row(task), n = g.end_row(task) - row;
    const Rows x = read(run, product, row, n, scratch + converted_at(run));
    float* made = reinterpret_cast<float*>(scratch + converted_at(run) + block_rows() * row_bytes(kind_, w_.cols));
    const int64_t stride = 4 * (tile_end - tile) * kTileRows;
    const Matrix part = tiles_of(w_, tile, tile_end);
    run.kernels.linear(part, nullptr, kind_, x.data, x.stride, n, g.prefill, 0, tile_end - tile, made, stride, scratch);
    const int64_t first = std::max(begin, tile * kTileRows), last = std::min(end, tile_end * kTileRows);
    for (int64_t r = 0; r < n; ++r) {
      const auto [token, group] = place(product, row + r);
      float* out = run.slots[out_.index].f32(token) + group * rows_ - begin;
      std::copy_n(made + r * stride / 4 + first - tile * kTileRows, last - first, out + first);
    }
  }

 private:
  int64_t converted_at(const Run& run) const { return round_up(int64_t(run.kernels.linear_scratch), 64); }
  int64_t block_rows() const { return largest(&LinearGrid::block_rows); }
  int64_t block_tiles() const { return largest(&LinearGrid::block_tiles); }
  int64_t largest(int64_t LinearGrid::* field) const {
    int64_t most = 1;
    for (int i = 0; i < grids_.count; ++i) most = std::max(most, grids_.grid[i].*field);
    return most;
  }

  struct Place {
    int64_t token, group;
  };
  Place place(int64_t product, int64_t row) const {  // of a row of a product
    return products_ == 1 ? Place{row / groups_, row % groups_} : Place{row, product};
  }

  // Rows of a product in the kind that the weights read: in place, or converted in scratch.
  Rows read(const Run& run, int64_t product, int64_t row, int64_t n, uint8_t* scratch) const {
    const Rows& from = run.slots[in_.index];
    if (kind_ == DSO_SLOT_F32 && products_ == groups_)
      return {reinterpret_cast<uint8_t*>(from.f32(row) + product * w_.cols), from.stride, n};
    const Rows converted{scratch, row_bytes(kind_, w_.cols), n};
    for (int64_t r = 0; r < n; ++r) {
      const auto [token, group] = place(product, row + r);
      const float* x = from.f32(token) + group * w_.cols;
      if (kind_ == DSO_SLOT_F32)
        std::copy_n(x, w_.cols, reinterpret_cast<float*>(converted.row(r)));
      else
        run.kernels.convert(kind_, x, 0, w_.cols, w_.cols, converted.row(r));
    }
    return converted;
  }

  const SlotRef in_, out_;
  const Matrix w_;
  const int32_t kind_;
  const int64_t groups_, products_, rows_;  // products_: 1 with a shared matrix; rows_: of the matrix, per group
  PhaseGrids grids_;
  int64_t in_group_ = 0;  // tasks of a product
};

}  // namespace

std::unique_ptr<Op> make_grouped_linear(StepReader& s) {
  s.takes(1, 1, 1, 0, DSO_FLAG_SHARED);
  const int64_t groups = s.positive("groups", s.step.groups);
  const bool shared = s.step.flags & DSO_FLAG_SHARED;
  const Matrix w = s.matrix(0);
  if (!shared && w.rows % groups) s.refuse("w[0] has %d rows, must be a multiple of groups, %lld", w.rows, (long long)groups);
  const SlotRef in = s.in(0, kF32Only, groups * w.cols),
                out = s.out(0, kF32Only, (shared ? groups : 1) * int64_t(w.rows), in.selected);
  s.alias_only(out, SlotRef{});
  return std::make_unique<GroupedLinear>(in, out, w, groups, shared);
}

}  // namespace dso
