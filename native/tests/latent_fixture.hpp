// A latent cache of one layer for tests: blocks in shuffled order in guarded memory that is NaN initially.
#pragma once
#include <algorithm>

#include "kv_fixture.hpp"
#include "layout.hpp"

struct LatentCache {
  const Kernels& kernels;
  KvLayout layout;
  int64_t tokens = 0;
  Buffer memory;
  std::vector<int32_t> table;
  KvView view;

  static KvLayout shape(int32_t type, int32_t rank, int32_t rope, int32_t index) {
    const int64_t row = latent_row_bytes(type, rank, rope), key = index_row_bytes(type, index);
    return {type, 0, 0, dso::round_up(32 * (row + key), 64), rank, rope, index, row, key};
  }
  LatentCache(const Kernels& k, const KvLayout& l, int64_t capacity, Random& random)
      : kernels(k),
        layout(l),
        memory((size_t)(Cache::blocks(capacity) * l.layer_bytes), 0xff),
        table((size_t)Cache::blocks(capacity)) {
    for (size_t i = 0; i < table.size(); ++i) table[i] = (int32_t)i;
    random.shuffle(table);
    view = {memory.get(), layout.layer_bytes, table.data()};
  }
  int64_t width() const { return layout.rank + layout.rope; }
  void write(int64_t start, const std::vector<float>& x) {  // dense rows
    const int64_t n = (int64_t)x.size() / width();
    for (int64_t t = 0; t < n;) {  // as in a plan, no write crosses a block
      const int64_t piece = std::min(n - t, 32 - (start + t) % 32);
      kernels.latent_write(layout, view, start + t, piece, x.data() + t * width(), width() * 4);
      t += piece;
    }
    tokens = std::max(tokens, start + n);
  }
  std::vector<float> read() const {  // [tokens, rank + rope]
    std::vector<float> x((size_t)(tokens * width()));
    kernels.latent_read(layout, view, tokens, x.data(), nullptr);
    return x;
  }
};
