// Chooses the form of latent attention for a ragged batch and splits it into tasks. Built once per step of the model and shared
// by all layers of the same shape, and by the products before and after the attention.
//
// Sequences in decode phase are absorbed, and those whose adapter changes kv_b; one in prefill uses the form with fewer
// multiply-adds, which depends only on its own lengths. An absorbed task is some heads of some rows of one sequence and some of
// their pieces (mla_pieces.hpp); an expanded one is some heads of some rows, and walks the chunks itself.
//
// Sparse attention: a row that sees no more than top_k tokens attends to all of them, like any other. Later rows are absorbed
// one by one, over chunks of 256 of their chosen tokens; so a row's bits are the same on both sides of this limit.
#pragma once
#include "countdown.hpp"
#include "mla_pieces.hpp"
#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

struct MlaShape {
  int64_t heads, nope, rope, rank, v_dim;
  int64_t top_k;     // maximum number of tokens that a row attends to; 0: all visible ones
  bool expand;       // expand every row
  MlaWindow window;  // not together with top_k
  bool operator==(const MlaShape&) const = default;
  int64_t width() const { return rank + rope; }
  int64_t head_dim() const { return nope + rope; }
  int64_t part_floats() const { return rank + 16; }  // per (row, head, piece): see Kernels::mla_attend
  bool can_expand() const;                           // whether the kernels support heads of this size
};

// Where an absorbed task stores the partial results of its rows and heads.
enum class MlaParts : uint8_t {
  kAlone,   // it has all pieces: in its scratch, one group at a time
  kPieces,  // one of several tasks: all pieces in the shared memory
  kGroups,  // one of several, with whole groups: groups in the shared memory, the pieces of one group in its scratch
};

struct MlaTask {
  bool expanded, sparse;
  MlaParts parts;
  int64_t sequence;
  int64_t h0, h1;    // absorbed: h0 is a multiple of mla_heads
  int64_t r0, r1;    // rows within the sequence
  MlaPieces pieces;  // pieces that the rows see (sparse: of the list of tokens chosen by its single row),
  int64_t p0, p1;    // and those of this task
  int64_t part;      // offset of the partial results in the shared memory, in floats
  int32_t merge;     // countdown: tasks left before all can be merged
  int64_t cost;      // multiply-adds
};

struct RowSpan {  // rows of a sequence that attend in the same way
  int64_t sequence, r0, r1;
  bool sparse, expanded;
  int64_t rows() const { return r1 - r0; }
};

struct RowRange {  // consecutive rows of the batch with one phase and form
  int64_t begin, end;
  bool decode, expanded;
};

class MlaSchedule {
 public:
  explicit MlaSchedule(const MlaShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing if it is up to date

  const MlaShape shape;
  std::vector<MlaTask> tasks;
  std::vector<RowRange> ranges;  // all rows, ascending
  Countdowns countdowns;
  int64_t shared_floats = 0;   // partial results in shared memory
  int64_t private_floats = 0;  // partial results in a task's scratch
  int64_t queries = 0;         // packed queries per task: rows x sets of mla_heads heads
  int64_t states = 0;          // per expanded task: rows x heads; 0: there is none

 private:
  void find_spans(const Run& run);
  bool expands(const Run& run, const RowSpan& span) const;
  int64_t cost(const Run& run, const RowSpan& span) const;  // multiply-adds per head
  MlaPieces pieces(const Run& run, const RowSpan& span, int64_t r0, int64_t r1) const;
  int64_t rows_of_a_block(const Run& run, const RowSpan& span) const;
  int64_t expanded_rows(const Run& run, int64_t rows) const;
  void add_range(int64_t rows, bool decode, bool expanded);
  void add_absorbed(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair);
  void add_expanded(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair);

  std::vector<RowSpan> spans_;
  int64_t room_ = 0;  // maximum floats of shared memory for the partial results of a block of rows
  int64_t built_ = 0;
};

// The schedule for a step's shape: heads, nope, rope, rank, v_dim, top_k, window, sinks and the EXPAND flag. Checks these
// fields.
std::shared_ptr<MlaSchedule> mla_schedule(StepReader& step);

}  // namespace dso
