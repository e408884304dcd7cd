// Shared by tests of dso_plan_decode: a batch of sequences, and how their tokens are chosen.
#pragma once
#include "plan_fixture.hpp"

inline dso_choice greedy() {
  dso_choice c{};
  c.top_p = 1;
  c.repetition = 1;
  return c;
}

struct DecodeBatch {  // of sequences that each have `context` tokens in blocks of their own
  DecodeBatch(const Model& model, int32_t rows, int32_t context, dso_cache* cache)
      : ids((size_t)rows),
        positions((size_t)rows, context),
        lengths((size_t)rows, context),
        ones((size_t)rows, 1),
        phase((size_t)rows, DSO_PHASE_DECODE),
        order((size_t)rows),
        table((size_t)rows * 2),
        logits((size_t)rows * (size_t)model.spec.vocab) {
    for (int32_t i = 0; i < rows; ++i) {
      ids[(size_t)i] = 7 + i;
      order[(size_t)i] = i;
      table[(size_t)i * 2] = 2 * i;
      table[(size_t)i * 2 + 1] = 2 * i + 1;
    }
    b.T = b.S = b.R = rows;
    b.max_blocks = 2;
    b.token_ids = ids.data();
    b.positions = positions.data();
    b.query_len = ones.data();
    b.context_len = lengths.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.logit_rows = order.data();
    b.logits = logits.data();
    b.cache = cache;
  }
  std::vector<int32_t> ids, positions, lengths, ones, phase, order, table;
  std::vector<float> logits;
  dso_batch b{};
};
