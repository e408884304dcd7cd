// Splits attention over a ragged batch into tasks. Built once per step of the model and shared by all layers of the same shape.
//
// A task is some heads of one kv head (of several if there are many sequences), some rows of one sequence and, in the decode
// family, a range of chunks of 256 tokens counted from the start of the sequence, or of eight blocks chosen by its single row.
// The split never changes a row's bits: chunks are merged in order, whichever thread computed them. Expensive tasks come first,
// and none exceeds a fraction of a thread's share, so that all threads finish together.
#pragma once
#include <cstdint>
#include <vector>

#include "countdown.hpp"
#include "linear_grid.hpp"
#include "op.hpp"

namespace dso {

struct AttentionShape {
  int64_t heads, kv_heads, head_dim, window, sinks;
  int64_t top_k;         // blocks chosen by each row and kv head; 0: no block choice
  bool eager, converts;  // converts: the finished row is written to a slot that is not fp32
  bool chunked;          // see VisibleTokens
  bool causal;           // whether rows see tokens up to their own only, whatever the batch says
  bool operator==(const AttentionShape&) const = default;
  VisibleTokens sight() const { return {window, sinks, nullptr, 0, chunked}; }
  // Of a sequence of a batch.
  VisibleTokens sight(const Batch& batch, int64_t sequence) const {
    VisibleTokens seen = sight();
    if (!causal) seen.ends = batch.ends(sequence);
    return seen;
  }
  int64_t group() const { return heads / kv_heads; }
  int64_t part_floats() const { return head_dim + 16; }  // per (row, head, chunk): see Kernels::attn_decode_chunk
};

enum class AttentionKind : uint8_t { kDecode, kPrefill, kEager };

// The chunks visible to the rows: those of the sinks, then those of their windows, then those of the copy of the newest tokens.
// With chosen blocks, eight make a chunk.
struct RowChunks {
  int64_t sinks, first, count;           // first: the first chunk after those of the sinks
  int64_t copied = 0, first_copied = 0;  // copied: how many of `count` are the copy's
  bool is_copied(int64_t i) const { return i >= count - copied; }
  int64_t at(int64_t i) const { return i < sinks ? i : is_copied(i) ? first_copied + i - (count - copied) : first + i - sinks; }
};

struct AttentionTask {
  AttentionKind kind;
  int64_t sequence, kv_head,
      kv_end;           // kv heads [kv_head, kv_end), processed one after the other; more than one only in the decode family
  int64_t h0, h1;       // q heads within the kv head's group
  int64_t r0, r1;       // rows within the sequence
  int64_t c0, c1;       // chunks of this task, a subrange of
  RowChunks chunks;     // the chunks of all tasks on these rows and heads
  int64_t part;         // offset of their partial results in the shared memory, in floats; -1: this task has all chunks
  int32_t merge, rows;  // countdowns: tasks left before the chunks can be merged, and before the rows are complete; -1: none
  int64_t cost;
};

class AttentionSchedule {
 public:
  explicit AttentionSchedule(const AttentionShape& shape) : shape(shape) {}
  void build(const Run& run);  // does nothing if it is up to date

  bool last(int32_t countdown) { return countdowns_.last(countdown); }

  const AttentionShape shape;
  std::vector<AttentionTask> tasks;
  // With several memory nodes and enough kv heads, each node has some of these, so that a head's q, k and v, which its products
  // have just written, and its results stay there.
  NodeTasks nodes;
  int64_t shared_floats = 0;   // partial results in shared memory
  int64_t private_floats = 0;  // for one task with all its chunks, or the scores of an eager row

 private:
  // Rows [r0, r1) of one sequence, all heads.
  void add_rows(const Run& run, AttentionKind kind, int64_t sequence, int64_t r0, int64_t r1, int64_t fair);
  int64_t rows_of_a_block(AttentionKind kind, int64_t chunks) const;
  AttentionKind kind_of(const Run& run, int64_t sequence) const;
  int64_t first_token(int64_t context, int64_t row) const;        // of the window, or 0 if it reaches the sinks
  int64_t tokens(int64_t context, int64_t r0, int64_t r1) const;  // visible to any of rows [r0, r1)
  RowChunks chunks(int64_t context, int64_t r0, int64_t r1) const;
  int64_t first_copied(int64_t context, int64_t row) const;  // the first token that is read from the copy

  VisibleTokens sight_;  // of the sequence whose tasks are added
  bool split_ = false;   // whether nodes have kv heads
  int64_t newest_ = 0;   // tokens that are read from the cache's copies
  int64_t built_ = 0;
  Countdowns countdowns_;
};

}  // namespace dso
