// A ragged batch, checked, and what the steps need to know of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dso.h"

namespace dso {

// What a plan asks of the batches it is given.
struct BatchNeeds {
  int64_t vocab = 0;  // ids are below it: the smaller of vocab_size and the embedding's rows
  bool token_ids = false, positions = false, states = false, logits = false;
  int64_t layers = 0;  // of the cache; 0: no cache is used
  int64_t kv_heads = 0, head_dim = 0;
  int64_t rank = 0, rope = 0, index = 0;  // of a latent cache, instead
  int64_t rope_tables = 0;
  bool summaries = false;  // of the cache
  // What attention sees: all, in one layer at least, or the widest window and the most sinks of any.
  bool sees_all = false;
  int64_t window = 0, sinks = 0;

  // Whether no row sees the block, of a sequence whose first row has so many tokens before it.
  bool hides(int64_t block, int64_t context) const;
};

// Consecutive rows of one sequence that lie in one cache block.
struct Piece {
  int64_t sequence, row, rows;  // row: of the batch
  int64_t position;             // in the cache
};

struct Batch {
  void set(const dso_batch& source, const BatchNeeds& needs);  // Error DSO_EINVAL before anything is changed

  const dso_batch* source = nullptr;
  int64_t T = 0, R = 0;
  int64_t decode_rows = 0, decode_logits = 0;  // how many leading rows (of T, of R) belong to sequences in decode phase
  int64_t serial = 0;                          // counts batches: what was made for one is stale for the next
  std::vector<int64_t> first_row;              // of each sequence
  std::vector<Piece> pieces;

  int64_t sequence_of(int64_t row) const {
    return std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin() - 1;
  }
  const int32_t* table(int64_t sequence) const { return source->block_table + sequence * source->max_blocks; }
};

void check_batch(const dso_batch& b, const BatchNeeds& needs);

}  // namespace dso
