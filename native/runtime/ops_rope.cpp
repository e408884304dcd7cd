// Rotary position embedding, and writing keys and values to the cache.
#include <cmath>

#include "cache_write.hpp"
#include "ops.hpp"

namespace dso {
namespace {

// cos | sin of position * inverse frequency (the sequence's own if the batch has them). The angle is the fp32 product, as in
// Transformers; cos and sin of that fp32 value are rounded once, from double.
class RopeTable final : public RowOp {
 public:
  RopeTable(const float* frequencies, std::vector<uint8_t> axes, const SlotRef& out, float scale)
      : frequencies_(frequencies), axes_(std::move(axes)), out_(out), scale_(scale) {}

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return 16 * out_.width; }  // a sine costs far more than an addition
  void row(const Run& run, int64_t r, int) override {
    float* out = run.slots[out_.index].f32(r);
    const int64_t half = out_.width / 2;
    const dso_batch& batch = *run.batch.source;
    const float* frequencies = batch.inv_freq ? batch.inv_freq + run.batch.sequence_of(r) * half : frequencies_;
    const float position = float(batch.positions[r]);
    const int32_t* on_axes = batch.axes && !axes_.empty() ? batch.axes + 3 * r : nullptr;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = (on_axes ? float(on_axes[axes_[size_t(i)]]) : position) * frequencies[i];
      out[i] = float(std::cos(double(angle))) * scale_;
      out[half + i] = float(std::sin(double(angle))) * scale_;
    }
  }
  const float* frequencies_;
  const std::vector<uint8_t> axes_;  // of each frequency: time, height or width; empty: there is one position
  const SlotRef out_;
  const float scale_;
};

struct HeadRotation {
  SlotRef table;
  int64_t heads, head_dim, offset;
  bool interleaved;
  void operator()(const Run& run, int64_t row, const float* x, int64_t n_heads, float* out) const {
    run.kernels.rope(x, run.slots[table.index].f32(row), n_heads, head_dim, offset, table.width, interleaved, out);
  }
};

class Rope final : public RowOp {
 public:
  Rope(const SlotRef& in, const SlotRef& out, const HeadRotation& rotate) : in_(in), out_(out), rotate_(rotate) {}

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return in_.width; }
  void row(const Run& run, int64_t r, int) override {
    rotate_(run, r, run.slots[in_.index].f32(r), rotate_.heads, run.slots[out_.index].f32(r));
  }
  const SlotRef in_, out_;
  const HeadRotation rotate_;
};

class PositionScale final : public RowOp {
 public:
  PositionScale(const SlotRef& in, const SlotRef& out, float beta, int64_t length, int64_t offset)
      : in_(in), out_(out), beta_(beta), length_(length), offset_(offset) {}

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return in_.width; }
  void row(const Run& run, int64_t r, int) override {
    const int64_t steps = (run.batch.source->positions[r] + offset_) / length_;
    const float factor = 1 + beta_ * float(std::log1p(double(steps)));
    run.kernels.scale(run.slots[in_.index].f32(r), factor, in_.width, run.slots[out_.index].f32(r));
  }
  const SlotRef in_, out_;
  const float beta_;
  const int64_t length_, offset_;
};

class KvWriter : public CacheWriter {
 public:
  KvWriter(const SlotRef& key, const SlotRef& value, int64_t layer, int64_t kv_heads)
      : CacheWriter(layer), key_(key), value_(value), kv_heads_(kv_heads) {}
  int64_t work(const Run& run) const override { return run.batch.T * (key_.width + value_.width); }

 protected:
  void write_rows(const Run& run, const Piece& p, const KvLayout& layout, const KvView& view, const float* key,
                  int64_t key_stride) const {
    const Rows& value = run.slots[value_.index];
    const auto write = [&](const KvLayout& to, const KvView& at) {
      run.kernels.kv_write(to, at, p.position, p.rows, key, key_stride, value.f32(p.row), value.stride, 0, kv_heads_);
    };
    write(layout, view);
    const dso_cache& cache = *run.batch.source->cache;
    if (const int64_t copy = cache.copy_of(layer_); cache.newest > 0)
      write(cache.layout(copy), cache.view(copy, run.batch.table(copy, p.sequence)));
    if (fills_summary(p, layout)) run.kernels.kv_summarize(layout, view, p.position / DSO_BLOCK_TOKENS);
  }
  const SlotRef key_, value_;
  const int64_t kv_heads_;
};

class CacheWrite final : public KvWriter {
 public:
  using KvWriter::KvWriter;

 private:
  void write(const Run& run, const Piece& p, const KvLayout& layout, const KvView& view, int) override {
    const Rows& key = run.slots[key_.index];
    write_rows(run, p, layout, view, key.f32(p.row), key.stride);
  }
};

class RopeCache final : public KvWriter {
 public:
  RopeCache(const SlotRef& q, const SlotRef& key, const SlotRef& value, const SlotRef& out, int64_t layer, int64_t kv_heads,
            const HeadRotation& rotate)
      : KvWriter(key, value, layer, kv_heads), q_(q), out_(out), rotate_(rotate) {}
  int64_t work(const Run& run) const override { return KvWriter::work(run) + run.batch.T * q_.width; }
  int64_t scratch_bytes(const Run&) const override { return DSO_BLOCK_TOKENS * key_.width * 4; }

 private:
  void write(const Run& run, const Piece& p, const KvLayout& layout, const KvView& view, int thread) override {
    float* rotated = reinterpret_cast<float*>(run.thread_scratch(thread));
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t r = p.row + i;
      rotate_(run, r, run.slots[q_.index].f32(r), rotate_.heads, run.slots[out_.index].f32(r));
      rotate_(run, r, run.slots[key_.index].f32(r), kv_heads_, rotated + i * key_.width);
    }
    write_rows(run, p, layout, view, rotated, 4 * key_.width);
  }
  const SlotRef q_, out_;
  const HeadRotation rotate_;
};

HeadRotation rotation(StepReader& s, int table) {
  const int64_t heads = s.positive("heads", s.step.heads), head_dim = s.positive("head_dim", s.step.head_dim);
  const SlotRef t = s.token_rows(table);
  if (s.step.offset < 0) s.refuse("offset is %d, must not be negative", s.step.offset);
  if (s.step.offset + t.width > head_dim || t.width % 2)
    s.refuse("in[%d], the table, has width %lld, which does not fit head_dim %lld with offset %d", table, (long long)t.width,
             (long long)head_dim, s.step.offset);
  return {t, heads, head_dim, s.step.offset, (s.step.flags & DSO_FLAG_INTERLEAVED) != 0};
}

}  // namespace

std::unique_ptr<Op> make_rope_table(StepReader& s) {
  s.takes(0, 1, s.has_weight(1) ? 2 : 1, 0, 0);
  const int32_t index = s.step.out[0];
  const int64_t width = index >= 0 && index < s.plan().n_slots ? s.plan().slots[index].width : 2;
  const SlotRef out = s.out(0, kF32Only, width, false);
  if (width % 2) s.refuse("out[0] has width %lld, must be even", (long long)width);
  s.plan().needs.positions = true;
  ++s.plan().needs.rope_tables;
  std::vector<uint8_t> axes;
  if (s.has_weight(1)) {
    const float* given = s.vector('w', 1, width / 2);
    for (int64_t i = 0; i < width / 2; ++i) {
      if (given[i] != 0 && given[i] != 1 && given[i] != 2)
        s.refuse("w[1][%lld], an axis, is %g, must be 0, 1 or 2", (long long)i, double(given[i]));
      axes.push_back(uint8_t(given[i]));
    }
  }
  return std::make_unique<RopeTable>(s.vector('w', 0, width / 2), std::move(axes), out, s.step.scale);
}

std::unique_ptr<Op> make_rope(StepReader& s) {
  s.takes(2, 1, 0, 0, DSO_FLAG_INTERLEAVED);
  const HeadRotation rotate = rotation(s, 1);
  const SlotRef in = s.token_rows(0, rotate.heads * rotate.head_dim), out = s.out(0, kF32Only, in.width, false);
  s.alias_only(out, in);
  return std::make_unique<Rope>(in, out, rotate);
}

std::unique_ptr<Op> make_position_scale(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const int64_t length = s.positive("window (the length)", s.step.window);
  if (s.step.offset < 0) s.refuse("offset is %d, must not be negative", s.step.offset);
  const SlotRef in = s.token_rows(0), out = s.out(0, kF32Only, in.width, false);
  s.alias_only(out, in);
  s.plan().needs.positions = true;
  return std::make_unique<PositionScale>(in, out, s.step.scale, length, s.step.offset);
}

std::unique_ptr<Op> make_cache_write(StepReader& s) {
  s.takes(2, 0, 0, 0, 0);
  s.attends(s.step.layer, s.step.kv_heads, s.step.head_dim, true);
  const int64_t width = int64_t(s.step.kv_heads) * s.step.head_dim;
  const SlotRef key = s.token_rows(0, width), value = s.token_rows(1, width);
  return std::make_unique<CacheWrite>(key, value, s.step.layer, s.step.kv_heads);
}

std::unique_ptr<Op> make_rope_cache(StepReader& s) {
  s.takes(4, 1, 0, 0, DSO_FLAG_INTERLEAVED);
  s.attends(s.step.layer, s.step.kv_heads, s.step.head_dim, true);
  const HeadRotation rotate = rotation(s, 3);
  const int64_t kv_width = int64_t(s.step.kv_heads) * s.step.head_dim;
  const SlotRef q = s.token_rows(0, rotate.heads * rotate.head_dim), key = s.token_rows(1, kv_width),
                value = s.token_rows(2, kv_width);
  const SlotRef out = s.out(0, kF32Only, q.width, false);
  s.alias_only(out, q);
  return std::make_unique<RopeCache>(q, key, value, out, s.step.layer, s.step.kv_heads, rotate);
}

}  // namespace dso
