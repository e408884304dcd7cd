// Two products with an activation between them, outside a plan, with the norm before them and the addition after them on
// request. The rows between norm and product, and between the products, exist in the kind that the product reads only.
#include <algorithm>

#include "check_arguments.hpp"
#include "dso.h"
#include "layout.hpp"
#include "linear_grid.hpp"
#include "mapped_files.hpp"
#include "ops.hpp"
#include "parallel.hpp"
#include "standalone.hpp"

namespace dso {
namespace {

struct FeedForward {
  Matrix first[2], down;  // with a gate: first[0] is it
  const float *bias[2], *down_bias;
  int count;                      // of first products
  const ElementwiseOp *op, *add;  // add: null without a residual
  int32_t activation, inner;
  const float *norm_weight, *norm_bias;
  float eps;
};

void check_reads(const Matrix& w, int32_t kind, const char* name) {
  if (!reads(w.format, kind))
    fail(DSO_EINVAL, "%s is %s, which %s weights do not support", name, kind_name(kind), format_name(w.format));
}

FeedForward checked(const Context& c, const dso_feed_forward& f) {
  FeedForward out{};
  const Matrix up = check_matrix(given(f.up, "up"), "up");
  out.down = check_matrix(given(f.down, "down"), "down");
  out.down_bias = f.down_bias;
  if (f.gate) out.first[out.count] = check_matrix(*f.gate, "gate"), out.bias[out.count++] = f.gate_bias;
  out.first[out.count] = up, out.bias[out.count++] = f.up_bias;
  const Matrix& first = out.first[0];
  if (first.rows != up.rows || first.cols != up.cols)
    fail(DSO_EINVAL, "gate is %d x %d, and up %d x %d: they must be equal", first.rows, first.cols, up.rows, up.cols);
  if (out.down.cols != up.rows)
    fail(DSO_EINVAL, "down has %d columns, and up %d rows: they must be equal", out.down.cols, up.rows);
  out.op = find_elementwise(c.kernels, f.op);
  if (!out.op || out.op->inputs != out.count)
    fail(DSO_EINVAL, "op %d is not an element-wise op with %d inputs", f.op, out.count);
  for (int i = 0; i < out.count; ++i) check_reads(out.first[i], f.activation, "activation");
  check_reads(out.down, f.inner, "inner");
  out.activation = f.activation, out.inner = f.inner;
  out.norm_weight = f.norm_weight, out.norm_bias = f.norm_bias, out.eps = f.eps;
  if (f.norm_weight && !(f.eps >= 0)) fail(DSO_EINVAL, "eps is %g, must not be negative", double(f.eps));
  if (f.residual && out.down.rows != up.cols)
    fail(DSO_EINVAL, "down has %d rows, and up %d columns: they must be equal for a residual", out.down.rows, up.cols);
  out.add = f.residual ? find_elementwise(c.kernels, DSO_OP_ADD) : nullptr;
  return out;
}

int64_t stride_of(int32_t kind, int64_t width) { return kind == DSO_SLOT_F32 ? 4 * width : row_bytes(kind, width); }

// All rows of prefill: products outside a plan have no decode family.
LinearGrid grid_of(const Matrix& w, int32_t kind, int64_t T, int threads, int64_t tiles_step) {
  return cut_by_phase(w, kind, T, 0, threads, matrix_bytes(w), tiles_step).grid[0];
}

void run(Context& c, const FeedForward& f, const float* x, int64_t T, float* y) {
  if (T < 0) fail(DSO_EINVAL, "T is %lld, must not be negative", (long long)T);
  if (T == 0) return;
  if (!x || !y) fail(DSO_EINVAL, "x or y is NULL");
  keep_handler();
  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  const Matrix& up = f.first[0];
  const LinearGrid in = grid_of(up, f.activation, T, team.threads(), 2), out = grid_of(f.down, f.inner, T, team.threads(), 1);
  const bool converted = f.activation != DSO_SLOT_F32, prepared = converted || f.norm_weight;
  const int64_t x_stride = stride_of(f.activation, up.cols), h_stride = stride_of(f.inner, up.rows);
  const int64_t block = in.block_rows * in.block_tiles * kTileRows;  // floats of a task's results
  const int64_t linear_scratch = round_up(int64_t(c.kernels.linear_scratch), 64);
  const int64_t h_at = round_up(prepared ? T * x_stride : 0, 4096), scratch_at = round_up(h_at + T * h_stride, 4096),
                scratch = round_up(std::max(linear_scratch + f.count * 4 * block, int64_t(up.cols) * 4), 4096);
  c.scratch.reserve(scratch_at + scratch * team.threads());
  uint8_t* const rows = prepared ? c.scratch.data() : reinterpret_cast<uint8_t*>(const_cast<float*>(x));
  uint8_t* const h = c.scratch.data() + h_at;
  const auto memory = [&](int thread) { return c.scratch.data() + scratch_at + thread * scratch; };

  const auto prepare_rows = [&](int64_t task, int thread) {
    if (!f.norm_weight) return convert_block(c.kernels, f.activation, x, T, up.cols, rows, x_stride, task);
    for (int64_t t = task * kConvertedRows; t < std::min(T, (task + 1) * kConvertedRows); ++t) {
      float* const normed = reinterpret_cast<float*>(converted ? memory(thread) : rows + t * x_stride);
      norm_row(c.kernels, x + t * up.cols, f.norm_weight, f.norm_bias, up.cols, f.eps, normed);
      if (converted) c.kernels.convert(f.activation, normed, 0, up.cols, up.cols, rows + t * x_stride);
    }
  };
  const auto first = [&](int64_t task, int thread) {
    const int64_t row = in.first_row(task), n = in.end_row(task) - row, tile = in.first_tile(task);
    const int64_t tile_end = std::min(tile + in.block_tiles, tile_rows(up)), column = tile * kTileRows;
    const int64_t columns = std::min(tile_end * kTileRows, int64_t(up.rows)) - column, stride = in.block_tiles * kTileRows;
    float* const results = reinterpret_cast<float*>(memory(thread) + linear_scratch);
    for (int i = 0; i < f.count; ++i)
      c.kernels.linear(tiles_of(f.first[i], tile, tile_end), f.bias[i] ? f.bias[i] + column : nullptr, f.activation,
                       rows + row * x_stride, x_stride, n, in.prefill, 0, tile_end - tile, results + i * block, 4 * stride,
                       memory(thread));
    for (int64_t r = 0; r < n; ++r) {
      float* const a = results + r * stride;
      uint8_t* const to = h + (row + r) * h_stride;
      f.op->row(a, f.count > 1 ? a + block : nullptr, columns, 0, a);
      if (f.inner == DSO_SLOT_F32)
        std::copy(a, a + columns, reinterpret_cast<float*>(to) + column);
      else
        c.kernels.convert(f.inner, a, column, column + columns, up.rows, to);
    }
  };
  const auto second = [&](int64_t task, int thread) {
    const int64_t row = out.first_row(task), n = out.end_row(task) - row, tile = out.first_tile(task);
    const int64_t tile_end = std::min(tile + out.block_tiles, tile_rows(f.down)), width = f.down.rows;
    c.kernels.linear(f.down, f.down_bias, f.inner, h + row * h_stride, h_stride, n, out.prefill, tile, tile_end,
                     y + row * width, 4 * width, memory(thread));
    if (!f.add) return;
    const int64_t column = tile * kTileRows, columns = std::min(tile_end * kTileRows, width) - column;
    for (int64_t at = row * width + column, r = 0; r < n; ++r, at += width) f.add->row(y + at, x + at, columns, 0, y + at);
  };
  Stages stages({{prepared ? ceil_div(T, kConvertedRows) : 0, prepare_rows}, {in.tasks(), first}, {out.tasks(), second}});
  team.run(stages);
  for (int i = 0; i < f.count; ++i) check_intact(f.first[i].data);
  check_intact(f.down.data);
}

}  // namespace
}  // namespace dso

extern "C" int32_t dso_run_feed_forward(dso_context* c, const dso_feed_forward* f, const float* x, int64_t T, float* y) {
  return dso::guarded([&] {
    dso::Context& context = dso::shared(c);
    dso::run(context, dso::checked(context, dso::given(f, "feed_forward")), x, T, y);
  });
}
