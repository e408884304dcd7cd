// How latent attention over a ragged batch is done and cut into tasks. Made once a step of the model, used by all layers that
// are alike, and by the products before and behind the attention.
//
// Sequences in decode phase are absorbed; one in prefill takes the form of fewer multiply-adds, which depends on nothing but its
// own lengths. An absorbed task is some heads of some rows of one sequence and a range of absolute chunks of 256 tokens, merged
// in order as AttentionSchedule's are; an expanded one is some heads of some rows, and walks the chunks by itself.
//
// Sparse attention: a row that sees no more than top_k tokens attends to all of them, like any other. The rows behind are absorbed,
// each by itself, over chunks of 256 of its chosen tokens; so a row's bits are the same on both sides of the border.
#pragma once
#include "countdown.hpp"
#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

struct MlaShape {
  int64_t heads, nope, rope, rank, v_dim;
  int64_t top_k;  // tokens that a row attends to, at most; 0: all that it sees
  bool expand;  // every row
  bool operator==(const MlaShape&) const = default;
  int64_t width() const { return rank + rope; }
  int64_t head_dim() const { return nope + rope; }
  int64_t part_floats() const { return rank + 16; }  // of one (row, head, chunk): see Kernels::mla_attend
  bool can_expand() const;                           // whether the kernels take heads of this size
};

struct MlaTask {
  bool expanded, sparse;
  int64_t sequence;
  int64_t h0, h1;      // absorbed: h0 is a multiple of mla_heads
  int64_t r0, r1;      // rows, within the sequence
  int64_t c0, c1;      // chunks of this task (sparse: of what its one row chose),
  int64_t chunks;      // and of all tasks on these rows and heads
  int64_t part;        // where the partial results of those begin in the shared memory, in floats; -1: this task has all chunks
  int32_t merge;       // countdown: tasks left before the chunks are merged; -1: none
  int64_t cost;        // multiply-adds
};

struct RowSpan {  // rows of a sequence that attend alike
  int64_t sequence, r0, r1;
  bool sparse, expanded;
  int64_t rows() const { return r1 - r0; }
};

struct RowRange {  // consecutive rows of the batch, of one phase and form
  int64_t begin, end;
  bool decode, expanded;
};

class MlaSchedule {
 public:
  explicit MlaSchedule(const MlaShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing when it is up to date

  const MlaShape shape;
  std::vector<MlaTask> tasks;
  std::vector<RowRange> ranges;  // all rows, ascending
  Countdowns countdowns;
  int64_t shared_floats = 0;   // partial results in shared memory
  int64_t private_floats = 0;  // partial results of a task with all its chunks
  int64_t queries = 0;         // packed queries of a task: rows x sets of mla_heads heads
  int64_t states = 0;          // of an expanded task: rows x heads; 0: there is none

 private:
  void find_spans(const Run& run);
  bool expands(const Run& run, const RowSpan& span) const;
  int64_t tokens(const Run& run, const RowSpan& span, int64_t end) const;  // that its rows before `end` attend to
  int64_t rows_of_a_block(const Run& run, const RowSpan& span) const;
  int64_t expanded_rows(const Run& run, int64_t rows) const;
  void add_range(int64_t rows, bool decode, bool expanded);
  void add_absorbed(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair);
  void add_expanded(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair);

  std::vector<RowSpan> spans_;

  int64_t built_ = 0;
};

// The schedule of a step's shape: heads, nope, rope, rank, v_dim, top_k and the EXPAND flag. Checks them.
std::shared_ptr<MlaSchedule> mla_schedule(StepReader& step);

}  // namespace dso
