#include "linear_grid.hpp"

namespace dso {
namespace {
// Few rows: bound by memory, so a task is a stretch of weights long enough for the prefetchers: with 128 KB at most, a 1.5B int4
// model decoded 8% slower than with 1 MB (46 against 50 tokens/s, three alternating runs on two Zen 5 cores).
constexpr int64_t kFewRows = 64;  // up to here the fetching of weights must hide behind the products of one stretch
constexpr int64_t kLeastBytes = 32 << 10, kMostBytes = 1024 << 10;
// Many rows: bound by arithmetic, so a task is a block whose activations stay in L2 while the tiles pass by.
constexpr int64_t kRowsBytes = 384 << 10;
constexpr int64_t kLeastRows = 64, kMostRows = 256;
constexpr int64_t kBlockTiles = 12;
constexpr int64_t kTileStep = 6;  // blocks of tiles are multiples of what the kernels keep in registers (3 tiles), and even
constexpr int64_t kTasksAThread = 4;

int64_t even_blocks(int64_t total, int64_t most, int64_t step) {  // the block size: equal blocks, none above `most`
  return round_up(ceil_div(total, ceil_div(total, most)), step);
}
}  // namespace

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
    g.block_tiles = std::min(round_up(ceil_div(bytes, tile_row_bytes(w)), kTileStep), round_up(ceil_div(tiles, threads), tiles_step));
  } else {
    const int64_t wanted = kTasksAThread * threads;
    int64_t most_rows = std::clamp(kRowsBytes / row_bytes(kind, w.cols), kLeastRows, kMostRows);
    g.block_tiles = std::min(kBlockTiles, round_up(tiles, tiles_step));
    while (most_rows > kLeastRows && ceil_div(rows, most_rows) * ceil_div(tiles, g.block_tiles) < wanted) most_rows /= 2;
    g.block_rows = even_blocks(rows, most_rows, 4);
    if (ceil_div(rows, g.block_rows) * ceil_div(tiles, g.block_tiles) < wanted) g.block_tiles = std::min<int64_t>(g.block_tiles, kTileStep);
  }
  g.row_blocks = ceil_div(rows, g.block_rows);
  g.tile_blocks = ceil_div(tiles, g.block_tiles);
  return g;
}

PhaseGrids cut_by_phase(const Matrix& w, int32_t kind, int64_t rows, int64_t decode, int threads, int64_t matrix_bytes, int64_t tiles_step) {
  PhaseGrids out;
  const bool one_family = kind == DSO_SLOT_Q8 || kind == DSO_SLOT_Q16 || w.format == DSO_FP8;
  if (one_family) decode = decode < rows ? 0 : rows;
  if (decode > 0) out.grid[out.count++] = cut(w, kind, 0, decode, false, threads, matrix_bytes, tiles_step);
  if (decode < rows) out.grid[out.count++] = cut(w, kind, decode, rows - decode, true, threads, matrix_bytes, tiles_step);
  return out;
}

}  // namespace dso
