// Shared by tests that run plans: a context, packed weights, and steps built from their operands.
#pragma once
#include <algorithm>
#include <memory>

#include "check.hpp"
// After check.hpp, whose names layout.hpp also defines.
#include "context.hpp"
#include "plan.hpp"

// As many threads, on this many made-up memory nodes in turn.
inline ThreadPlaces on_nodes(int threads, int nodes) {
  std::vector<Cpu> cpus;
  for (int i = 0; i < threads; ++i) cpus.push_back({i, i, i % nodes, i % nodes, 0, 1024});
  return place_threads(cpus, threads, false);
}

struct OwnContext {
  dso_context* c;
  OwnContext(const Kernels& k, ThreadPlaces places)
      : c(new dso_context{std::make_shared<Context>(k, std::move(places), false)}) {}
  // DSO_TEST_NODES: the tests run as if the threads were on this many memory nodes.
  OwnContext(const Kernels& k, int threads)
      : OwnContext(k, getenv("DSO_TEST_NODES") ? on_nodes(threads, std::max(1, atoi(getenv("DSO_TEST_NODES"))))
                                               : place_threads({}, threads, true)) {}
  ~OwnContext() { dso_context_destroy(c); }
  OwnContext(const OwnContext&) = delete;
};

// w [count, rows, cols] as a stack, or (count 0) as a single matrix; `keep` owns the tiles.
inline dso_weight packed_weight(dso_context* c, int32_t format, const std::vector<float>& w, int32_t count, int32_t rows,
                                int32_t cols, std::vector<std::unique_ptr<Buffer>>& keep) {
  const size_t bytes = ::packed_bytes(format, rows, cols), numbers = (size_t)rows * (size_t)cols,
               matrices = (size_t)std::max(1, count);
  Buffer& tiles = *keep.emplace_back(std::make_unique<Buffer>(bytes * matrices));
  for (size_t i = 0; i < matrices; ++i)
    check(dso_pack(c, format, DSO_SRC_F32, w.data() + i * numbers, rows, cols, cols, nullptr, tiles.get() + i * bytes) == 0,
          "pack: %s", dso_last_error());
  return {format, rows, cols, count, tiles.get(), (int64_t)tiles.size()};
}

// Operands in order; -1 if absent.
inline dso_step step_of(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out,
                        const std::vector<int32_t>& w = {}, const std::vector<int32_t>& b = {}) {
  dso_step s{};
  s.op = op;
  s.scale = 1;
  auto fill = [](int32_t* to, size_t n, const std::vector<int32_t>& from) {
    for (size_t i = 0; i < n; ++i) to[i] = i < from.size() ? from[i] : -1;
  };
  fill(s.in, 4, in);
  fill(s.out, 3, out);
  fill(s.w, 3, w);
  fill(s.b, 3, b);
  return s;
}
