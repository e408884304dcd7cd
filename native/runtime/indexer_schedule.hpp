// Splits token choice for a ragged batch into tasks. Built once per step of the model and shared by all layers of the same
// shape.
//
// A row that sees no more than top_k tokens takes all of them, at almost no cost. The others form blocks of a few rows of one
// sequence, which share one pass over the keys; if such a block exceeds a thread's share, several tasks each score a range of
// its tokens, and the last to finish makes the choice. A score does not depend on the range in which it was computed, so
// neither does the choice.
#pragma once
#include <cstdint>
#include <vector>

#include "countdown.hpp"
#include "op.hpp"

namespace dso {

struct IndexShape {
  int64_t heads, index, top_k;
  int64_t every = 1;  // tokens that share a key; a row that is token i of its sequence sees (i + 1) / every keys
  int64_t seen(int64_t context, int64_t row) const { return (context + row + 1) / every; }
  bool operator==(const IndexShape&) const = default;
};

struct IndexTask {
  int64_t sequence, r0, r1;  // rows within the sequence
  int64_t t0, t1;            // keys to score; none: the rows take all visible ones
  int64_t stride;            // floats from one row's scores to the next row's
  int64_t part;              // offset of the block's scores in the shared memory, in floats; -1: this task computes all of them
  int32_t merge;             // countdown: tasks left before the rows can choose
  int64_t cost;
};

class IndexSchedule {
 public:
  explicit IndexSchedule(const IndexShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing if it is up to date
  bool last(int32_t countdown) { return countdowns_.last(countdown); }

  static constexpr int64_t kRows = 4;  // rows per block: 64 heads of 128 take 128 KB packed
  static constexpr int64_t kTokens =
      256;  // tokens scored for all rows of a block before the next ones, so that their keys stay in cache

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
