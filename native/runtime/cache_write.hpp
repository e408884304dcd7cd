// Steps that write to the cache. A task covers the part of a sequence within one cache block, so that no two threads write to
// the same block.
#pragma once
#include "cache.hpp"
#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

class CacheWriter : public Op {
 public:
  explicit CacheWriter(int64_t layer) : layer_(layer) {}
  void shape(const Run&) override {}
  int64_t tasks(const Run& run) const override { return int64_t(run.batch.pieces.size()); }
  void task(const Run& run, int64_t index, int thread) override {
    const Piece& p = run.batch.pieces[index];
    const dso_cache& cache = *run.batch.source->cache;
    write(run, p, cache.layout(layer_), cache.view(layer_, run.batch.table(layer_, p.sequence)), thread);
  }

 protected:
  virtual void write(const Run& run, const Piece& piece, const KvLayout& layout, const KvView& view, int thread) = 0;
  // Whether this part completes its block, so that the cache needs its summary.
  static bool fills_summary(const Piece& p, const KvLayout& layout) {
    return layout.summary_bytes > 0 && (p.position + p.rows) % DSO_BLOCK_TOKENS == 0;
  }
  const int64_t layer_;
};

// Writes unmodified rows, one per token, with a kernel of this signature.
class RowsWriter final : public CacheWriter {
 public:
  using Kernel = void (*Kernels::*)(const KvLayout& l, const KvView& v, int64_t start, int64_t n, const float* x,
                                    int64_t stride);
  using Summarize = void (*Kernels::*)(const KvLayout& l, const KvView& v, int64_t block);
  RowsWriter(const SlotRef& in, int64_t layer, Kernel kernel, Summarize summarize = nullptr)
      : CacheWriter(layer), in_(in), kernel_(kernel), summarize_(summarize) {}
  int64_t work(const Run& run) const override { return run.batch.T * in_.width; }

 private:
  void write(const Run& run, const Piece& p, const KvLayout& layout, const KvView& view, int) override {
    const Rows& x = run.slots[in_.index];
    (run.kernels.*kernel_)(layout, view, p.position, p.rows, x.f32(p.row), x.stride);
    if (summarize_ && fills_summary(p, layout)) (run.kernels.*summarize_)(layout, view, p.position / DSO_BLOCK_TOKENS);
  }
  const SlotRef in_;
  const Kernel kernel_;
  const Summarize summarize_;  // for completed blocks, if the cache has summaries
};

}  // namespace dso
