// Writing rows to the cache, and computing the entries that windows of tokens are compressed to.
#include <cmath>

#include "cache_write.hpp"
#include "entry_places.hpp"
#include "ops.hpp"

namespace dso {
namespace {

// Entries whose last token is in the part of a sequence that a task covers.
class Compress final : public CacheWriter {
 public:
  struct Shape {
    int64_t source, every, width, offset, rot;
    bool overlap;
  };
  Compress(const Shape& shape, int64_t layer, const float* bias, const float* weight, const float* inv_freq, float eps,
           float scale)
      : CacheWriter(layer), s_(shape), bias_(bias), weight_(weight), inv_freq_(inv_freq), eps_(eps), scale_(scale) {}
  int64_t work(const Run& run) const override { return run.batch.T * s_.width * (s_.overlap ? 16 : 8); }
  int64_t scratch_bytes(const Run&) const override { return 4 * (2 * round_up(s_.width, 16) + s_.rot); }

 private:
  void write(const Run& run, const Piece& p, const KvLayout& layout, const KvView& view, int thread) override {
    const dso_cache& cache = *run.batch.source->cache;
    const KvView source = cache.view(s_.source, run.batch.table(s_.source, p.sequence));
    float *made = reinterpret_cast<float*>(run.thread_scratch(thread)), *normed = made + round_up(s_.width, 16),
          *table = normed + round_up(s_.width, 16);
    const int64_t end = (p.position + p.rows) / s_.every;
    for (int64_t entry = p.position / s_.every; entry < end; ++entry) {
      run.kernels.compress_entry(cache.layout(s_.source), source, entry, s_.every, s_.overlap, bias_, s_.width, made);
      run.kernels.rms_norm(made, weight_, s_.width, eps_, normed);
      const int64_t half = s_.rot / 2;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(float(entry * s_.every) * inv_freq_[i]);
        table[i] = float(std::cos(angle) * scale_);
        table[half + i] = float(std::sin(angle) * scale_);
      }
      run.kernels.rope(normed, table, 1, s_.width, s_.offset, s_.rot, true, made);
      run.kernels.latent_write(layout, view, EntryPlaces{s_.every}.at(entry), 1, made, 4 * s_.width);
    }
  }
  const Shape s_;
  const float *bias_, *weight_, *inv_freq_;
  const float eps_, scale_;
};

}  // namespace

std::unique_ptr<Op> make_rows_write(StepReader& s) {
  s.takes(1, 0, 0, 0, 0);
  const SlotRef in = s.token_rows(0);
  s.writes_rows(s.step.layer, in.width, 1);
  return std::make_unique<RowsWriter>(in, s.step.layer, &Kernels::latent_write);
}

std::unique_ptr<Op> make_compress(StepReader& s) {
  s.takes(0, 0, 3, 0, DSO_FLAG_OVERLAP);
  const bool overlap = s.step.flags & DSO_FLAG_OVERLAP;
  const int64_t every = s.positive("groups", s.step.groups), width = s.vector_size(1), rot = 2 * s.vector_size(2),
                series = overlap ? 2 : 1;
  if (s.step.offset < 0 || s.step.offset + rot > width)
    s.refuse("offset is %d: %lld rotated elements do not fit rows of %lld", s.step.offset, (long long)rot, (long long)width);
  s.writes_rows(s.step.layer, width, every);
  s.attends_rows(s.step.index, 2 * series * width, 1, series * every, true);
  const Compress::Shape shape{s.step.index, every, width, s.step.offset, rot, overlap};
  return std::make_unique<Compress>(shape, s.step.layer, s.vector('w', 0, every * series * width), s.vector('w', 1, width),
                                    s.vector('w', 2, rot / 2), s.eps(), s.step.scale);
}

}  // namespace dso
