// Splits block choice for a ragged batch into tasks, and locates the summaries of each sequence's blocks. Built once per step
// of the model and shared by all layers of the same shape.
//
// A row that sees no more than top_k blocks takes all of them. The others form tasks of one kv head and a few rows of one
// sequence, which share one pass over the summaries; if that exceeds a thread's share, several tasks each estimate some of the
// panels, and the last to finish makes the choice. An estimate depends only on its row and its block, and so does the choice.
#pragma once
#include <cstdint>
#include <vector>

#include "countdown.hpp"
#include "op.hpp"

namespace dso {

struct BlockShape {  // latents: one kv head, and head_dim is the width of a whole row
  int64_t heads, kv_heads, head_dim, top_k, window, sinks;
  bool operator==(const BlockShape&) const = default;
  int64_t group() const { return heads / kv_heads; }
  int64_t first() const { return ceil_div(sinks, DSO_BLOCK_TOKENS); }  // first block after those of the sinks
  int64_t seen(int64_t token) const { return token / DSO_BLOCK_TOKENS + 1; }
  int64_t end(int64_t token) const {
    return std::max<int64_t>(0, token + 1 - window) / DSO_BLOCK_TOKENS;
  }  // first block of its window
};

// Blocks [block, block + count) of a sequence whose estimates are consecutive, starting at `at`, when the estimates of its
// panels are stored one after the other.
struct BlockRun {
  int64_t block, count, at;
};

struct BlockTask {
  int64_t sequence, r0, r1;  // rows within the sequence
  int64_t kv_head;           // -1: the rows take all visible blocks, for all kv heads
  int64_t p0, p1;            // range of `panels`
  int64_t first, width;      // the first panel of all tasks on these rows, and the number of blocks in all their panels
  int64_t b0, b1;            // range of `runs`
  int64_t part;              // offset of all estimates in the shared memory, in floats; -1: this task computes all of them
  int32_t merge;             // countdown: tasks left before the rows can choose
  int64_t cost;
};

class BlockSchedule {
 public:
  explicit BlockSchedule(const BlockShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing if it is up to date

  const BlockShape shape;
  std::vector<BlockTask> tasks;
  std::vector<int32_t> panels;  // one sequence after the other, ascending: panels with blocks that may be chosen
  std::vector<BlockRun> runs;   // one sequence after the other
  int64_t shared_floats = 0, private_floats = 0;  // estimates
  int64_t candidates = 0;                         // blocks per row
  Countdowns countdowns;

 private:
  int64_t rows_that_see_all(const dso_batch& b, int64_t sequence) const;
  int64_t rows_of_a_task(int64_t width) const;
  void add_all_seen(int64_t sequence, int64_t rows);
  void add_chosen(const Run& run, int64_t sequence, int64_t first_row, int64_t fair);
  void find_blocks(const int32_t* table, int64_t end);

  int64_t built_ = 0;
};

}  // namespace dso
