#include "standalone.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "error.hpp"
#include "fp8_blocks.hpp"
#include "ggml_blocks.hpp"
#include "layout.hpp"
#include "linear_grid.hpp"
#include "mapped_files.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kNormed = 1 << 15;  // elements per task of a norm

void check_activation(int32_t format, int32_t kind) {
  if (!reads(format, kind))
    fail(DSO_EINVAL, "activation is %s, which %s weights do not support", kind_name(kind), format_name(format));
}

}  // namespace

static void pack_blocks(Context& c, int32_t format, const uint8_t* source, int64_t rows, int64_t cols, int64_t stride,
                        uint8_t* packed) {
  const GgmlBlock block = ggml_block(format);
  if (!block.cols) fail(DSO_EINVAL, "no ggml type can be repacked to format %s", format_name(format));
  if (cols % block.cols || stride % block.cols)
    fail(DSO_EINVAL, "ggml blocks of %s need cols and stride that are multiples of %lld, got %lld and %lld",
         format_name(format), (long long)block.cols, (long long)cols, (long long)stride);
  parallel(c, ceil_div(rows, kTileRows), [&](int64_t tile, int) {
    repack_tile_row(format, source, rows, cols, stride / block.cols * block.bytes, tile, packed);
  });
  check_intact(source);
}

void pack(Context& c, int32_t format, int32_t source_type, const void* source, int64_t rows, int64_t cols, int64_t stride,
          const float* importance, void* packed) {
  if (tile_bytes(format) < 0) fail(DSO_EINVAL, "format %d is unknown", format);
  if (packed_bytes(format, rows, cols) < 0)
    fail(DSO_EINVAL, "invalid shape: a matrix of %lld x %lld", (long long)rows, (long long)cols);
  if (source_type != DSO_SRC_F32 && source_type != DSO_SRC_BF16 && source_type != DSO_SRC_F16 && source_type != DSO_SRC_GGML)
    fail(DSO_EINVAL, "src_type %d is unknown", source_type);
  if (stride < cols) fail(DSO_EINVAL, "stride is %lld, less than cols, %lld", (long long)stride, (long long)cols);
  if (!source || !packed) fail(DSO_EINVAL, "src or dst is NULL");
  keep_handler();
  if (source_type == DSO_SRC_GGML)
    return pack_blocks(c, format, static_cast<const uint8_t*>(source), rows, cols, stride, static_cast<uint8_t*>(packed));
  if (int_layout(format).low && format != DSO_INT8 && format != DSO_INT4 && format != DSO_INT3 && format != DSO_Q4_1 &&
      !int_layout(format).split)
    fail(DSO_EINVAL, "%s is packed from ggml blocks only, src_type is %d", format_name(format), source_type);
  for (int64_t k = 0; importance && k < cols; ++k)
    if (!(importance[k] >= 0 && importance[k] <= std::numeric_limits<float>::max()))
      fail(DSO_EINVAL, "importance[%lld] is %g, must be finite and not negative", (long long)k, double(importance[k]));
  const int64_t stride_bytes = stride * (source_type == DSO_SRC_F32 ? 4 : 2);
  parallel(c, ceil_div(rows, band_rows(format)), [&](int64_t tile, int) {
    c.kernels.pack_tile(format, source_type, source, rows, cols, stride_bytes, importance, tile, static_cast<uint8_t*>(packed));
  });
  check_intact(source);
}

void pack_fp8(Context& c, const uint8_t* codes, const float* scales, int64_t rows, int64_t cols, int64_t stride, void* packed) {
  if (packed_bytes(DSO_FP8, rows, cols) < 0)
    fail(DSO_EINVAL, "invalid shape: a matrix of %lld x %lld", (long long)rows, (long long)cols);
  if (stride < cols) fail(DSO_EINVAL, "stride is %lld, less than cols, %lld", (long long)stride, (long long)cols);
  if (!codes || !scales || !packed) fail(DSO_EINVAL, "codes, scales or dst is NULL");
  parallel(c, ceil_div(rows, band_rows(DSO_FP8)),
           [&](int64_t band, int) { repack_fp8_band(codes, scales, rows, cols, stride, band, static_cast<uint8_t*>(packed)); });
  check_intact(codes);
}

void unpack(Context& c, const dso_weight& weight, int64_t row_begin, int64_t row_end, float* out) {
  const Matrix w = check_matrix(weight, "weight");
  if (row_begin < 0 || row_end < row_begin || row_end > w.rows)
    fail(DSO_EINVAL, "rows %lld to %lld are not a valid range of %d rows", (long long)row_begin, (long long)row_end, w.rows);
  if (row_begin == row_end) return;
  if (!out) fail(DSO_EINVAL, "dst is NULL");
  keep_handler();
  parallel(c, ceil_div(row_end - row_begin, kTileRows), [&](int64_t block, int) {
    const int64_t begin = row_begin + block * kTileRows, end = std::min(begin + kTileRows, row_end);
    c.kernels.unpack_rows(w, begin, end, out + block * kTileRows * w.cols, 4 * int64_t(w.cols));
  });
  check_intact(weight.data);
}

void convert_block(const Kernels& k, int32_t kind, const float* x, int64_t T, int64_t width, uint8_t* rows, int64_t stride,
                   int64_t block) {
  for (int64_t t = block * kConvertedRows; t < std::min(T, (block + 1) * kConvertedRows); ++t)
    k.convert(kind, x + t * width, 0, width, width, rows + t * stride);
}

void convert(Context& c, int32_t kind, const float* x, int64_t T, int64_t width, void* rows) {
  if (kind != DSO_SLOT_BF16 && kind != DSO_SLOT_Q8 && kind != DSO_SLOT_Q16)
    fail(DSO_EINVAL, "slot_kind is %d, must be BF16, Q8 or Q16", kind);
  const int64_t stride = row_bytes(kind, width);
  if (stride < 0) fail(DSO_EINVAL, "width is %lld, out of range", (long long)width);
  if (T < 0) fail(DSO_EINVAL, "T is %lld, must not be negative", (long long)T);
  if (T == 0) return;
  if (!x || !rows) fail(DSO_EINVAL, "x or rows is NULL");
  parallel(c, ceil_div(T, kConvertedRows), [&](int64_t block, int) {
    convert_block(c.kernels, kind, x, T, width, static_cast<uint8_t*>(rows), stride, block);
  });
}

void norm_row(const Kernels& k, const float* x, const float* weight, const float* bias, int64_t width, float eps, float* y) {
  if (bias)
    k.layer_norm(x, weight, bias, width, eps, y);
  else
    k.rms_norm(x, weight, width, eps, y);
}

void norm(Context& c, const float* x, int64_t T, int64_t width, const float* weight, const float* bias, float eps, float* y) {
  if (T < 0 || width < 1 || width > INT32_MAX)
    fail(DSO_EINVAL, "T is %lld and width %lld, must be at least 0 and 1", (long long)T, (long long)width);
  if (!(eps >= 0)) fail(DSO_EINVAL, "eps is %g, must not be negative", double(eps));
  if (T == 0) return;
  if (!x || !weight || !y) fail(DSO_EINVAL, "x, weight or y is NULL");
  const int64_t rows = std::max<int64_t>(1, kNormed / width);
  parallel(c, ceil_div(T, rows), [&](int64_t block, int) {
    for (int64_t t = block * rows; t < std::min(T, (block + 1) * rows); ++t)
      norm_row(c.kernels, x + t * width, weight, bias, width, eps, y + t * width);
  });
}

void linear(Context& c, const dso_weight& weight, const float* bias, int32_t kind, const float* x, const void* converted,
            int64_t T, int64_t decode, float* y) {
  const Matrix w = check_matrix(weight, "weight");
  check_activation(w.format, kind);
  if (T < 0) fail(DSO_EINVAL, "T is %lld, must not be negative", (long long)T);
  if (decode < 0 || decode > T)
    fail(DSO_EINVAL, "decode_rows is %lld, must be from 0 to T, %lld", (long long)decode, (long long)T);
  if (T == 0) return;
  if ((!x && !converted) || !y) fail(DSO_EINVAL, "x or y is NULL");

  keep_handler();
  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  const bool converts = kind != DSO_SLOT_F32 && !converted;
  const int64_t x_stride = kind != DSO_SLOT_F32 ? row_bytes(kind, w.cols) : 4 * int64_t(w.cols);
  const int64_t scratch_at = round_up(converts ? T * x_stride : 0, 4096),
                scratch = round_up(int64_t(c.kernels.linear_scratch) + 1, 4096);
  c.scratch.reserve(scratch_at + scratch * team.threads());
  const void* const read = converted ? converted : x;
  uint8_t* rows =
      converts ? c.scratch.data() : static_cast<uint8_t*>(const_cast<void*>(read));  // in the other case they are only read

  const PhaseGrids grids = cut_by_phase(w, kind, T, decode, team.threads(), matrix_bytes(w));
  auto convert_rows = [&](int64_t block, int) { convert_block(c.kernels, kind, x, T, w.cols, rows, x_stride, block); };
  auto product = [&](int64_t task, int thread) {
    const bool first = task < grids.grid[0].tasks();
    const LinearGrid& g = grids.grid[first ? 0 : 1];
    if (!first) task -= grids.grid[0].tasks();
    const int64_t row = g.first_row(task), tile = g.first_tile(task);
    c.kernels.linear(w, bias, kind, rows + row * x_stride, x_stride, g.end_row(task) - row, g.prefill, tile,
                     std::min(tile + g.block_tiles, tile_rows(w)), y + row * w.rows, 4 * int64_t(w.rows),
                     c.scratch.data() + scratch_at + thread * scratch);
  };
  Stages stages(
      {{converts ? ceil_div(T, kConvertedRows) : 0, convert_rows}, {grids.grid[0].tasks() + grids.grid[1].tasks(), product}});
  team.run(stages);
  check_intact(weight.data);
}

}  // namespace dso
