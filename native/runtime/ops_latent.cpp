// Latents: normalizing, rotating and writing them to the cache.
#include "cache_write.hpp"
#include "ops.hpp"

namespace dso {
namespace {

class Latent final : public RowOp {
 public:
  Latent(const SlotRef& in, const SlotRef& table, const SlotRef& out, const float* weight, float eps, bool interleaved)
      : in_(in), table_(table), out_(out), weight_(weight), eps_(eps), interleaved_(interleaved) {}

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return in_.width; }
  void row(const Run& run, int64_t r, int) override {
    const int64_t rope = table_.width, rank = in_.width - rope;
    const float* x = run.slots[in_.index].f32(r);
    float* out = run.slots[out_.index].f32(r);
    run.kernels.rms_norm(x, weight_, rank, eps_, out);
    run.kernels.rope(x + rank, run.slots[table_.index].f32(r), 1, rope, 0, rope, interleaved_, out + rank);
  }
  const SlotRef in_, table_, out_;
  const float* weight_;
  const float eps_;
  const bool interleaved_;
};

}  // namespace

std::unique_ptr<Op> make_latent(StepReader& s) {
  s.takes(2, 1, 1, 0, DSO_FLAG_INTERLEAVED);
  const int64_t rank = s.positive("rank", s.step.rank), rope = s.positive("rope", s.step.rope);
  if (rope % 2) s.refuse("rope is %lld, must be even", (long long)rope);
  const SlotRef in = s.token_rows(0, rank + rope), table = s.token_rows(1, rope), out = s.out(0, kF32Only, rank + rope, false);
  s.alias_only(out, in);
  return std::make_unique<Latent>(in, table, out, s.vector('w', 0, rank), s.eps(), (s.step.flags & DSO_FLAG_INTERLEAVED) != 0);
}

std::unique_ptr<Op> make_latent_write(StepReader& s) {
  s.takes(1, 0, 0, 0, 0);
  s.attends_latent(s.step.layer, s.step.rank, s.step.rope, true);
  return std::make_unique<RowsWriter>(s.token_rows(0, int64_t(s.step.rank) + s.step.rope), s.step.layer, &Kernels::latent_write,
                                      &Kernels::latent_summarize);
}

}  // namespace dso
