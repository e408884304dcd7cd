// How one matrix product is cut into tasks: blocks of rows x blocks of weight tiles, never along the sum.
#pragma once
#include <algorithm>

#include "layout.hpp"

namespace dso {

struct LinearGrid {
  int64_t row_begin = 0, rows = 0;
  bool prefill = false;
  int64_t block_rows = 1, block_tiles = 1;
  int64_t row_blocks = 0, tile_blocks = 0;

  int64_t tasks() const { return row_blocks * tile_blocks; }
  // Blocks of rows within a block of tiles: the threads share the weights that one of them fetched from memory.
  int64_t first_row(int64_t task) const { return row_begin + task % row_blocks * block_rows; }
  int64_t end_row(int64_t task) const { return std::min(first_row(task) + block_rows, row_begin + rows); }
  int64_t first_tile(int64_t task) const { return task / row_blocks * block_tiles; }
};

// Task `index` of `tasks`, taken by `threads` threads in turns, as a place in their order in memory: each thread mostly goes on
// where it ended, so that what its kernels fetched ahead is what comes next.
inline int64_t in_stretches(int64_t index, int64_t tasks, int64_t threads) {
  const int64_t lane = index % threads, longer = tasks % threads;
  return lane * (tasks / threads) + std::min(lane, longer) + index / threads;
}

// `matrix_bytes`: of all matrices that share the step. `tiles_step`: blocks of tiles are multiples of it.
LinearGrid cut(const Matrix& w, int32_t kind, int64_t row_begin, int64_t rows, bool prefill, int threads, int64_t matrix_bytes,
               int64_t tiles_step = 1);

// The leading `decode` rows and the others, in at most two grids. For integer formats and FP8 both phases
// are one family, and one grid reads the weights once.
struct PhaseGrids {
  LinearGrid grid[2];
  int count = 0;
};
PhaseGrids cut_by_phase(const Matrix& w, int32_t kind, int64_t rows, int64_t decode, int threads, int64_t matrix_bytes, int64_t tiles_step = 1);

}  // namespace dso
