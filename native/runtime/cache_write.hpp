// Steps that write to the cache. Tasks are pieces of sequences that lie in one cache block, so that no two threads write to one block.
#pragma once
#include "cache.hpp"
#include "op.hpp"

namespace dso {

class CacheWriter : public Op {
 public:
  explicit CacheWriter(int64_t layer) : layer_(layer) {}
  void shape(const Run&) override {}
  int64_t tasks(const Run& run) const override { return int64_t(run.batch.pieces.size()); }
  void task(const Run& run, int64_t index, int thread) override {
    const Piece& p = run.batch.pieces[index];
    const dso_cache& cache = *run.batch.source->cache;
    write(run, p, cache.layout, cache.view(layer_, run.batch.table(p.sequence)), thread);
  }

 protected:
  virtual void write(const Run& run, const Piece& piece, const KvLayout& layout, const KvView& view, int thread) = 0;

 private:
  const int64_t layer_;
};

}  // namespace dso
