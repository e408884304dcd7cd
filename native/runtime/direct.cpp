#include "direct.hpp"

#include <algorithm>
#include <atomic>

#include "error.hpp"
#include "layout.hpp"
#include "linear_grid.hpp"

namespace dso {
namespace {

// f(begin, end, thread) over blocks of [0, n), by whichever thread is free.
class Shared {
 public:
  Shared(int64_t n, int64_t block) : n_(n), block_(block) {}
  template <class F>
  void work(int thread, F&& f) {
    for (int64_t begin; (begin = next_.fetch_add(block_, std::memory_order_relaxed)) < n_;)
      f(begin, std::min(n_, begin + block_), thread);
  }

 private:
  const int64_t n_, block_;
  std::atomic<int64_t> next_{0};
};

template <class F>
void parallel(Context& c, int64_t n, int64_t block, F&& f) {
  ThreadPool::Lease lease(c.pool);
  Shared shared(n, block);
  lease.team().run([&](int thread) { shared.work(thread, f); });
}

void check_activation(int32_t format, int32_t kind) {
  if (!reads(format, kind)) fail(DSO_EINVAL, "activation is %s, which %s weights do not read", kind_name(kind), format_name(format));
}

}  // namespace

void pack(Context& c, int32_t format, int32_t source_type, const void* source, int64_t rows, int64_t cols, int64_t stride, void* packed) {
  if (tile_bytes(format) < 0) fail(DSO_EINVAL, "format %d is unknown", format);
  if (packed_bytes(format, rows, cols) < 0) fail(DSO_EINVAL, "a matrix of %lld x %lld", (long long)rows, (long long)cols);
  if (source_type != DSO_SRC_F32 && source_type != DSO_SRC_BF16 && source_type != DSO_SRC_F16)
    fail(DSO_EINVAL, "src_type %d is unknown", source_type);
  if (stride < cols) fail(DSO_EINVAL, "stride is %lld, cols are %lld", (long long)stride, (long long)cols);
  if (!source || !packed) fail(DSO_EINVAL, "src or dst is NULL");
  const int64_t stride_bytes = stride * (source_type == DSO_SRC_F32 ? 4 : 2);
  parallel(c, ceil_div(rows, kTileRows), 1, [&](int64_t tile, int64_t end, int) {
    for (; tile < end; ++tile)
      c.kernels.pack_tile(format, source_type, source, rows, cols, stride_bytes, tile, static_cast<uint8_t*>(packed));
  });
}

void unpack(Context& c, const dso_weight& weight, int64_t row_begin, int64_t row_end, float* out) {
  const Matrix w = check_matrix(weight, "weight");
  if (row_begin < 0 || row_end < row_begin || row_end > w.rows)
    fail(DSO_EINVAL, "rows %lld to %lld of %d", (long long)row_begin, (long long)row_end, w.rows);
  if (row_begin == row_end) return;
  if (!out) fail(DSO_EINVAL, "dst is NULL");
  parallel(c, row_end - row_begin, kTileRows, [&](int64_t begin, int64_t end, int) {
    c.kernels.unpack_rows(w, row_begin + begin, row_begin + end, out + begin * w.cols, 4 * int64_t(w.cols));
  });
}

void convert(Context& c, int32_t kind, const float* x, int64_t T, int64_t width, void* rows) {
  if (kind != DSO_SLOT_BF16 && kind != DSO_SLOT_Q8 && kind != DSO_SLOT_Q16) fail(DSO_EINVAL, "slot_kind %d is no kind to convert to", kind);
  const int64_t stride = row_bytes(kind, width);
  if (stride < 0) fail(DSO_EINVAL, "width is %lld", (long long)width);
  if (T < 0) fail(DSO_EINVAL, "T is %lld", (long long)T);
  if (T == 0) return;
  if (!x || !rows) fail(DSO_EINVAL, "x or rows is NULL");
  parallel(c, T, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      c.kernels.convert(kind, x + t * width, 0, width, width, static_cast<uint8_t*>(rows) + t * stride);
  });
}

void linear(Context& c, const dso_weight& weight, const float* bias, int32_t kind, const float* x, int64_t T, int64_t decode, float* y) {
  const Matrix w = check_matrix(weight, "weight");
  check_activation(w.format, kind);
  if (T < 0) fail(DSO_EINVAL, "T is %lld", (long long)T);
  if (decode < 0 || decode > T) fail(DSO_EINVAL, "decode_rows is %lld, T is %lld", (long long)decode, (long long)T);
  if (T == 0) return;
  if (!x || !y) fail(DSO_EINVAL, "x or y is NULL");

  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  const bool converted = kind != DSO_SLOT_F32;
  const int64_t x_stride = converted ? row_bytes(kind, w.cols) : 4 * int64_t(w.cols);
  const int64_t scratch_at = round_up(converted ? T * x_stride : 0, 4096), scratch = round_up(int64_t(c.kernels.linear_scratch) + 1, 4096);
  c.scratch.reserve(scratch_at + scratch * team.threads());
  uint8_t* rows = converted ? c.scratch.data() : reinterpret_cast<uint8_t*>(const_cast<float*>(x));  // only read in that case

  const PhaseGrids grids = cut_by_phase(w, kind, T, decode, team.threads(), tile_rows(w) * tile_row_bytes(w));
  Shared conversion(converted ? T : 0, 8), first(grids.grid[0].tasks(), 1), second(grids.grid[1].tasks(), 1);
  auto product = [&](const LinearGrid& g, Shared& tasks, int thread) {
    tasks.work(thread, [&](int64_t task, int64_t, int) {
      const int64_t row = g.first_row(task), tile = g.first_tile(task);
      c.kernels.linear(w, bias, kind, rows + row * x_stride, x_stride, g.end_row(task) - row, g.prefill, tile,
                       std::min(tile + g.block_tiles, tile_rows(w)), y + row * w.rows, 4 * int64_t(w.rows),
                       c.scratch.data() + scratch_at + thread * scratch);
    });
  };
  team.run([&](int thread) {
    conversion.work(thread, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) c.kernels.convert(kind, x + t * w.cols, 0, w.cols, w.cols, rows + t * x_stride);
    });
    team.barrier.arrive();
    product(grids.grid[0], first, thread);
    product(grids.grid[1], second, thread);
  });
}

}  // namespace dso
