// Splits one matrix product into tasks: blocks of rows x blocks of weight tiles, never along the sum.
#pragma once
#include <algorithm>
#include <vector>

#include "layout.hpp"
#include "node_memory.hpp"
#include "thread_places.hpp"

namespace dso {

// Few rows: limited by memory, so a task is a run of weights long enough for the prefetchers: with at most 128 KB, a 1.5B int4
// model decoded 8% slower than with 1 MB (46 instead of 50 tokens/s, three alternating runs on two Zen 5 cores).
constexpr int64_t kFewRows = 64;  // with fewer rows, the products of one run must hide the fetching of its weights
constexpr int64_t kLeastBytes = 32 << 10, kMostBytes = 1024 << 10;
// Many rows: limited by arithmetic, so a task is a block whose activations stay in L2 while it processes the tiles.
constexpr int64_t kLeastRows = 64, kMostRows = 256;
constexpr int64_t kTileStep = 6;  // blocks of tiles are multiples of the tiles that kernels hold in registers (3), and even
constexpr int64_t kTasksAThread = 4;
int64_t max_rows(int32_t kind, int64_t width);  // per block, if there are many rows

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

// Maps task `index` of `tasks`, taken by `threads` threads in turn, to a position in memory order: each thread mostly continues
// where its last task ended, so that its kernels' prefetched data is used next.
inline int64_t in_stretches(int64_t index, int64_t tasks, int64_t threads) {
  const int64_t lane = index % threads, longer = tasks % threads;
  return lane * (tasks / threads) + std::min(lane, longer) + index / threads;
}

// The tasks of a step in the order of the nodes that have their weights; with one node, all of them.
class NodeTasks {
 public:
  void clear() { ends_.clear(); }
  void add(int64_t end) { ends_.push_back(end); }  // of the next node's tasks
  int64_t end(int node) const { return ends_[size_t(node)]; }
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }
  // in_stretches, among the tasks and the threads of the task's node.
  int64_t in_stretches(const ThreadPlaces& places, int64_t index) const {
    size_t i = 0;
    while (ends_[i] <= index) ++i;
    const int64_t begin = i ? ends_[i - 1] : 0;
    return begin + dso::in_stretches(index - begin, ends_[i] - begin, places.nodes[i].threads);
  }

 private:
  std::vector<int64_t> ends_;
};

// The tiles of a matrix that a node has: an even number, so that groups of 32 columns of the result stay whole.
inline Range tiles_of_node(const ThreadPlaces& places, int node, const Matrix& w) {
  return places.of_node(node, tile_rows(w), 2);
}
// Adds the bytes of `count` matrices of one shape, stored consecutively.
inline void add_weights(const ThreadPlaces& places, const Stack& w, std::vector<NodeRange>& out) {
  const int64_t bytes = tile_row_bytes(w.first);
  for (int64_t m = 0; m < w.count; ++m)
    for (int i = 0; i < places.nodes_count(); ++i) {
      const Range tiles = tiles_of_node(places, i, w.first);
      if (tiles.size() > 0) out.push_back({w.at(m).data + tiles.begin * bytes, tiles.size() * bytes, i});
    }
}

// `matrix_bytes`: of all matrices that share the step. `tiles_step`: blocks of tiles are multiples of it.
LinearGrid cut(const Matrix& w, int32_t kind, int64_t row_begin, int64_t rows, bool prefill, int threads, int64_t matrix_bytes,
               int64_t tiles_step = 1);

// Whether both phases use one kernel family: integer products are exact, and FP8's kernel is the same for all rows.
inline bool one_family(const Matrix& w, int32_t kind) {
  return kind == DSO_SLOT_Q8 || kind == DSO_SLOT_Q16 || w.format == DSO_FP8;
}

// The leading `decode` rows and the others, in at most two grids; in one, which reads the weights once, if both phases use one
// family.
struct PhaseGrids {
  LinearGrid grid[2];
  int count = 0;
};
PhaseGrids cut_by_phase(const Matrix& w, int32_t kind, int64_t rows, int64_t decode, int threads, int64_t matrix_bytes,
                        int64_t tiles_step = 1);

}  // namespace dso
