// How choosing tokens for a ragged batch is cut into tasks. Made once a step of the model, used by all layers that are alike.
//
// A row that sees no more than top_k tokens takes all of them and costs next to nothing. The others go in blocks of a few rows
// of one sequence, which share a read of the keys; where such a block is more than a thread's share, several tasks score a
// range of its tokens each, and the last to end chooses. A score does not depend on the range it was made in, so neither does
// the choice.
#pragma once
#include <cstdint>
#include <vector>

#include "countdown.hpp"
#include "op.hpp"

namespace dso {

struct IndexShape {
  int64_t heads, index, top_k;
  bool operator==(const IndexShape&) const = default;
};

struct IndexTask {
  int64_t sequence, r0, r1;  // rows, within the sequence
  int64_t t0, t1;            // tokens to score; none: the rows take all they see
  int64_t stride;            // floats from a row's scores to the next row's
  int64_t part;   // where the scores of the block lie in the shared memory, in floats; -1: this task makes all of them
  int32_t merge;  // countdown: tasks left before the rows are chosen for
  int64_t cost;
};

class IndexSchedule {
 public:
  explicit IndexSchedule(const IndexShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing when it is up to date
  bool last(int32_t countdown) { return countdowns_.last(countdown); }

  static constexpr int64_t kRows = 4;  // of a block: 64 heads of 128 take 128 KB packed
  static constexpr int64_t kTokens =
      256;  // that all rows of a block are scored against, one after the other: their keys stay near

  const IndexShape shape;
  std::vector<IndexTask> tasks;
  int64_t shared_floats = 0, private_floats = 0;  // scores

 private:
  void add_all_seen(int64_t sequence, int64_t rows);
  void add_scored(int64_t sequence, int64_t context, int64_t r0, int64_t r1, int64_t fair);

  int64_t built_ = 0;
  Countdowns countdowns_;
};

}  // namespace dso
