// A ragged batch after validation, and what steps need to know about it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "dso.h"

namespace dso {

struct HeadsShape {  // of one layer of the cache
  int32_t kv_heads = 0, head_dim = 0;
};

struct RowsShape {  // of one kind of rows in the cache; width 0: not used
  int64_t width = 0, every = 0;
  bool plain = false;  // its elements are read as fp32 or bf16
};

// The tokens that rows see in a layer of the cache, or in any of several: all of them, or else the widest window and the most
// sinks.
struct Visible {
  bool used = false;  // by a step of the plan
  bool all = false;
  int64_t window = 0, sinks = 0;

  void add(const Visible& other);
  // Whether no row sees this block of a sequence with `context` tokens before its first row.
  bool hides(int64_t block, int64_t context) const;
};

// A plan's requirements for its batches.
struct BatchNeeds {
  int64_t vocab = 0;        // exclusive limit of token ids: the rows of the smallest table that is read by them
  bool token_ids = false;   // where batches have no inputs_embeds
  bool ids_always = false;  // even if they have
  bool positions = false, states = false, logits = false;
  int64_t layers = 0;                     // of the cache; 0: the plan uses no cache
  std::vector<HeadsShape> heads;          // of each layer, kv_heads 0: not used; empty: the cache has latents
  int64_t rank = 0, rope = 0, index = 0;  // of a latent cache, instead of heads
  std::vector<RowsShape> rows;            // of a cache of rows, by kind; empty: the cache has none
  bool whole_sequences = false;           // whether the step must contain all tokens of each sequence
  bool choices = false;                   // whether rows attend to chosen blocks or tokens only
  int64_t rope_tables = 0;
  int64_t features = 0;                         // of ADD_FEATURES
  bool axes = false;                            // whether rows are in a grid, or padding
  int64_t grid_rows = 0, grid_cols = 0;         // of the smallest grid; 0: there is none
  int64_t hidden_width = 0;                     // of the last hidden state; 0: the plan returns none
  bool summaries = false;                       // whether the cache must have summaries
  std::vector<dso_state_shape> recurrent;       // recurrent states, by number; heads 0: not used
  std::vector<Visible> visible;                 // by layer
  std::vector<dso_adapter_site> adapter_sites;  // by number; rows or cols 0: not used
  int32_t adapter_rank = 0;                     // of the adapters at most
};

// Consecutive rows of one sequence within one cache block.
struct Piece {
  int64_t sequence, row, rows;  // row: index in the batch
  int64_t position;             // in the cache
};

// Consecutive rows of the batch with one adapter.
struct AdaptedRows {
  int32_t slot;
  int64_t first, count;  // rows
};

struct Batch {
  void set(const dso_batch& source, const BatchNeeds& needs);  // Error DSO_EINVAL before anything is changed

  const dso_batch* source = nullptr;
  int64_t T = 0, R = 0;
  int64_t decode_rows = 0, decode_logits = 0;  // number of leading rows (of T, of R) of sequences in decode phase
  int64_t serial = 0;                          // counts batches: data computed for another batch is stale
  std::vector<int64_t> first_row;              // per sequence
  std::vector<Piece> pieces;
  std::vector<AdaptedRows> adapted;   // ascending; empty: no row has an adapter
  std::vector<bool> adapts_heads;     // per sequence: its adapter changes keys or values of latent attention
  std::vector<int64_t> first_target;  // per sequence, and one more: its entries of state_to

  int64_t sequence_of(int64_t row) const {
    return std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin() - 1;
  }
  // One past the last token that each row of a sequence attends to; null: its own.
  const int32_t* ends(int64_t sequence) const {
    return source->visible_to ? source->visible_to + first_row[size_t(sequence)] : nullptr;
  }
  // The block table of a sequence for this layer of the cache.
  const int32_t* table(int64_t layer, int64_t sequence) const;
};

void check_batch(const dso_batch& b, const BatchNeeds& needs);

}  // namespace dso
