#include "linear_grid.hpp"

namespace dso {
namespace {
constexpr int64_t kRowsBytes = 384 << 10;
constexpr int64_t kBlockTiles = 12;

int64_t even_blocks(int64_t total, int64_t most, int64_t step) {  // the block size: equal blocks, none larger than `most`
  return round_up(ceil_div(total, ceil_div(total, most)), step);
}
}  // namespace

int64_t max_rows(int32_t kind, int64_t width) { return std::clamp(kRowsBytes / row_bytes(kind, width), kLeastRows, kMostRows); }

LinearGrid cut(const Matrix& w, int32_t kind, int64_t row_begin, int64_t rows, bool prefill, int threads, int64_t matrix_bytes,
               int64_t tiles_step) {
  LinearGrid g;
  if (rows <= 0) return g;
  g.row_begin = row_begin;
  g.rows = rows;
  g.prefill = prefill;
  const int64_t tiles = tile_rows(w);
  if (rows < kFewRows) {
    const int64_t bytes = std::clamp(matrix_bytes / (kTasksAThread * threads), kLeastBytes, kMostBytes);
    g.block_rows = rows;
    g.block_tiles =
        std::min(round_up(ceil_div(bytes, tile_row_bytes(w)), kTileStep), round_up(ceil_div(tiles, threads), tiles_step));
  } else {
    const int64_t wanted = kTasksAThread * threads;
    int64_t most = max_rows(kind, w.cols);
    g.block_tiles = std::min(kBlockTiles, round_up(tiles, tiles_step));
    while (most > kLeastRows && ceil_div(rows, most) * ceil_div(tiles, g.block_tiles) < wanted) most /= 2;
    g.block_rows = even_blocks(rows, most, 4);
    if (ceil_div(rows, g.block_rows) * ceil_div(tiles, g.block_tiles) < wanted)
      g.block_tiles = std::min<int64_t>(g.block_tiles, kTileStep);
  }
  g.row_blocks = ceil_div(rows, g.block_rows);
  g.tile_blocks = ceil_div(tiles, g.block_tiles);
  return g;
}

PhaseGrids cut_by_phase(const Matrix& w, int32_t kind, int64_t rows, int64_t decode, int threads, int64_t matrix_bytes,
                        int64_t tiles_step) {
  PhaseGrids out;
  if (one_family(w, kind)) decode = decode < rows ? 0 : rows;
  if (decode > 0) out.grid[out.count++] = cut(w, kind, 0, decode, false, threads, matrix_bytes, tiles_step);
  if (decode < rows) out.grid[out.count++] = cut(w, kind, decode, rows - decode, true, threads, matrix_bytes, tiles_step);
  return out;
}

}  // namespace dso
