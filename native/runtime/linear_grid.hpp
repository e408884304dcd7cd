// How one matrix product is cut into tasks: blocks of rows x blocks of weight tiles, never along the sum.
#pragma once
#include <algorithm>

#include "layout.hpp"

namespace dso {

// Few rows: bound by memory, so a task is a stretch of weights long enough for the prefetchers: with 128 KB at most, a 1.5B
// int4 model decoded 8% slower than with 1 MB (46 against 50 tokens/s, three alternating runs on two Zen 5 cores).
constexpr int64_t kFewRows = 64;  // below it the fetching of weights must hide behind the products of one stretch
constexpr int64_t kLeastBytes = 32 << 10, kMostBytes = 1024 << 10;
// Many rows: bound by arithmetic, so a task is a block whose activations stay in L2 while the tiles pass by.
constexpr int64_t kLeastRows = 64, kMostRows = 256;
constexpr int64_t kTileStep = 6;  // blocks of tiles are multiples of what the kernels keep in registers (3 tiles), and even
constexpr int64_t kTasksAThread = 4;
int64_t max_rows(int32_t kind, int64_t width);  // of a block of many

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

// Whether both phases are one kernel family: integer products are exact, and FP8's kernel is one for all rows.
inline bool one_family(const Matrix& w, int32_t kind) {
  return kind == DSO_SLOT_Q8 || kind == DSO_SLOT_Q16 || w.format == DSO_FP8;
}

// The leading `decode` rows and the others, in at most two grids; where both phases are one family, in one, which reads the
// weights once.
struct PhaseGrids {
  LinearGrid grid[2];
  int count = 0;
};
PhaseGrids cut_by_phase(const Matrix& w, int32_t kind, int64_t rows, int64_t decode, int threads, int64_t matrix_bytes,
                        int64_t tiles_step = 1);

}  // namespace dso
