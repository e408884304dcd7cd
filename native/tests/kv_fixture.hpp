// A cache of one layer for tests: blocks in shuffled order in guarded memory that is NaN initially.
#pragma once
#include "check.hpp"

struct Cache {
  const Kernels& kernels;
  KvLayout layout;
  int64_t tokens;
  Buffer memory;
  std::vector<int32_t> table;
  KvView view;

  Cache(const Kernels& k, int32_t type, int32_t kv_heads, int32_t head_dim, int64_t capacity, Random& random)
      : kernels(k),
        layout{type, kv_heads, head_dim, k.kv_layer_bytes(type, kv_heads, head_dim)},
        tokens(0),
        memory((size_t)(blocks(capacity) * layout.layer_bytes), 0xff),
        table((size_t)blocks(capacity)) {
    for (size_t i = 0; i < table.size(); ++i) table[i] = (int32_t)i;
    random.shuffle(table);
    view = {memory.get(), layout.layer_bytes, table.data()};
  }
  static int64_t blocks(int64_t capacity) { return (capacity + 31) / 32; }
  int64_t width() const { return (int64_t)layout.kv_heads * layout.head_dim; }
  void write(int64_t start, int64_t n, const float* k, const float* v) {  // dense rows
    kernels.kv_write(layout, view, start, n, k, width() * 4, v, width() * 4, 0, layout.kv_heads);
    if (start + n > tokens) tokens = start + n;
  }
  void read(std::vector<float>& k, std::vector<float>& v) const {  // [kv_heads, tokens, head_dim]
    k.assign((size_t)(tokens * width()), 0.0f);
    v = k;
    kernels.kv_read(layout, view, tokens, k.data(), v.data());
  }
};
