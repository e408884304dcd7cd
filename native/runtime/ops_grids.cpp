// Patches of a picture in a grid: heads of attention with relative positions, and padding.
#include <algorithm>
#include <cstring>

#include "ops.hpp"

namespace dso {
namespace {

struct Grid {
  int64_t heads, head_dim, rows, cols;
};

class LongerHeads : public RowOp {  // heads of head_dim elements become longer
 public:
  LongerHeads(const SlotRef& in, const SlotRef& out, const Grid& grid) : in_(in), out_(out), grid_(grid) {}

 protected:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return out_.width; }
  void row(const Run& run, int64_t r, int) override {
    const int64_t width = out_.width / grid_.heads, own = grid_.head_dim, end = own + grid_.rows + grid_.cols;
    const int32_t* at = run.batch.source->axes + 3 * r;
    const float* x = run.slots[in_.index].f32(r);
    float* y = run.slots[out_.index].f32(r);
    for (int64_t h = 0; h < grid_.heads; ++h, x += own, y += width) {
      head(run, x, at[1], at[2], y, y + own);
      std::fill(y + end, y + width, 0.0f);
    }
  }
  // Writes a head's own elements to `y` and those of the grid's rows and columns to `places`.
  virtual void head(const Run& run, const float* x, int64_t i, int64_t j, float* y, float* places) const = 0;

  const SlotRef in_, out_;
  const Grid grid_;
};

class GridQueries final : public LongerHeads {
 public:
  GridQueries(const SlotRef& in, const SlotRef& out, const Grid& grid, const float* by_row, const float* by_col, float scale)
      : LongerHeads(in, out, grid), by_row_(by_row), by_col_(by_col), scale_(scale) {}

 private:
  int64_t row_work() const override { return in_.width * (grid_.rows + grid_.cols) / 8; }
  void head(const Run& run, const float* x, int64_t i, int64_t j, float* y, float* places) const override {
    const int64_t own = grid_.head_dim, rows = grid_.rows, cols = grid_.cols;
    run.kernels.scale(x, scale_, own, y);
    run.kernels.vector_product(x, own, by_row_ + rows - 1 - i, 2 * rows - 1, rows, places);
    run.kernels.vector_product(x, own, by_col_ + cols - 1 - j, 2 * cols - 1, cols, places + rows);
  }
  const float *by_row_, *by_col_;
  const float scale_;
};

class GridKeys final : public LongerHeads {
 public:
  using LongerHeads::LongerHeads;

 private:
  void head(const Run&, const float* x, int64_t i, int64_t j, float* y, float* places) const override {
    std::memcpy(y, x, sizeof(float) * size_t(grid_.head_dim));
    std::fill(places, places + grid_.rows + grid_.cols, 0.0f);
    places[i] = places[grid_.rows + j] = 1.0f;
  }
};

class ZeroPadding final : public RowOp {
 public:
  ZeroPadding(const SlotRef& in, const SlotRef& out) : in_(in), out_(out) {}
  int64_t scratch_bytes(const Run&) const override { return is_f32(out_.kind) ? 0 : 4 * out_.width; }

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return out_.width; }
  void row(const Run& run, int64_t r, int thread) override {
    const float* x = run.slots[in_.index].f32(r);
    const bool padding = run.batch.source->axes[3 * r] != 0, plain = is_f32(out_.kind);
    float* y = plain ? run.slots[out_.index].f32(r) : reinterpret_cast<float*>(run.thread_scratch(thread));
    if (padding)
      std::fill(y, y + out_.width, 0.0f);
    else if (y != x)
      std::memcpy(y, x, sizeof(float) * size_t(out_.width));
    if (!plain) write_columns(run, out_, r, y, 0, out_.width);
  }
  const SlotRef in_, out_;
};

Grid grid(StepReader& s) {
  const Grid g{s.positive("heads", s.step.heads), s.positive("head_dim", s.step.head_dim),
               s.positive("grid_rows", s.step.grid_rows), s.positive("grid_cols", s.step.grid_cols)};
  BatchNeeds& needs = s.plan().needs;
  const auto smaller = [](int64_t known, int64_t own) { return known ? std::min(known, own) : own; };
  needs.axes = true;
  needs.grid_rows = smaller(needs.grid_rows, g.rows);
  needs.grid_cols = smaller(needs.grid_cols, g.cols);
  return g;
}

SlotRef longer(StepReader& s, const Grid& g) {
  const SlotRef out = s.out(0, kF32Only, 0, false);
  if (out.width % g.heads || out.width / g.heads < g.head_dim + g.rows + g.cols)
    s.refuse("out[0] has width %lld, must be that of %lld heads of at least %lld elements", (long long)out.width,
             (long long)g.heads, (long long)(g.head_dim + g.rows + g.cols));
  s.alias_only(out, SlotRef{});
  return out;
}

}  // namespace

std::unique_ptr<Op> make_grid_queries(StepReader& s) {
  s.takes(1, 1, 2, 0, 0);
  const Grid g = grid(s);
  const SlotRef in = s.token_rows(0, g.heads * g.head_dim);
  const float *by_row = s.vector('w', 0, g.head_dim * (2 * g.rows - 1)),
              *by_col = s.vector('w', 1, g.head_dim * (2 * g.cols - 1));
  return std::make_unique<GridQueries>(in, longer(s, g), g, by_row, by_col, s.step.scale);
}

std::unique_ptr<Op> make_grid_keys(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const Grid g = grid(s);
  const SlotRef in = s.token_rows(0, g.heads * g.head_dim);
  return std::make_unique<GridKeys>(in, longer(s, g), g);
}

std::unique_ptr<Op> make_zero_padding(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  s.plan().needs.axes = true;
  const SlotRef in = s.token_rows(0), out = s.out(0, kAnyKind, in.width, false);
  s.alias_only(out, in);
  return std::make_unique<ZeroPadding>(in, out);
}

}  // namespace dso
