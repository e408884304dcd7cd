// The low-rank products of adapters, for consecutive rows with the same adapter at a time.
#include "adapters.hpp"
#include "ops.hpp"

namespace dso {
namespace {

constexpr int64_t kUpTiles = 64;  // tiles of outputs per task of LORA_UP

class Lora : public Op {
 public:
  explicit Lora(int32_t site) : site_(site) {}
  void shape(const Run&) override {}
  int64_t work(const Run&) const override { return kSerialWork; }

 protected:
  const dso_adapters::Pair& pair(const Run& run, const AdaptedRows& rows) const {
    return run.batch.source->adapters->pair(rows.slot, site_);
  }
  const int32_t site_;
};

class LoraDown final : public Lora {
 public:
  LoraDown(int32_t site, const SlotRef& x, const SlotRef& h) : Lora(site), x_(x), h_(h), tiles_(ceil_div(h.width, kTileRows)) {}
  int64_t tasks(const Run& run) const override { return int64_t(run.batch.adapted.size()) * tiles_; }
  void task(const Run& run, int64_t index, int) override {
    const AdaptedRows& rows = run.batch.adapted[size_t(index / tiles_)];
    const LowRank& a = pair(run, rows).down;
    const int64_t tile = index % tiles_;
    if (tile * kTileRows >= a.rows) return;
    const Rows &x = run.slots[x_.index], &h = run.slots[h_.index];
    run.kernels.low_rank(a, x.f32(rows.first), x.stride, rows.count, tile, tile + 1, false, h.f32(rows.first), h.stride);
  }

 private:
  const SlotRef x_, h_;
  const int64_t tiles_;
};

class LoraUp final : public Lora {
 public:
  LoraUp(int32_t site, const SlotRef& h, const SlotRef& y)
      : Lora(site), h_(h), y_(y), tiles_(ceil_div(y.width, kTileRows)), parts_(ceil_div(tiles_, kUpTiles)) {}
  int64_t tasks(const Run& run) const override { return int64_t(run.batch.adapted.size()) * parts_; }
  void task(const Run& run, int64_t index, int) override {
    const AdaptedRows& rows = run.batch.adapted[size_t(index / parts_)];
    const LowRank& b = pair(run, rows).up;
    if (b.rows == 0) return;
    const int64_t tile = index % parts_ * kUpTiles;
    const Rows &h = run.slots[h_.index], &y = run.slots[y_.index];
    run.kernels.low_rank(b, h.f32(rows.first), h.stride, rows.count, tile, std::min(tile + kUpTiles, tiles_), true,
                         y.f32(rows.first), y.stride);
  }

 private:
  const SlotRef h_, y_;
  const int64_t tiles_, parts_;
};

}  // namespace

std::unique_ptr<Op> make_lora_down(StepReader& s) {
  s.takes(1, 1, 0, 0, 0);
  const SlotRef x = s.token_rows(0), h = s.out(0, kF32Only, s.positive("rank", s.step.rank), false);
  s.alias_only(h, SlotRef{});
  s.adapts(0, int32_t(x.width), int32_t(h.width));
  return std::make_unique<LoraDown>(s.step.index, x, h);
}

std::unique_ptr<Op> make_lora_up(StepReader& s) {
  s.takes(2, 1, 0, 0, 0);
  const SlotRef h = s.token_rows(0, s.positive("rank", s.step.rank)), y = s.token_rows(1),
                out = s.out(0, kF32Only, y.width, false);
  if (out.index != y.index || h.index == y.index)
    s.refuse("out[0] is slot %d, must be in[1], slot %d, and not in[0]", out.index, y.index);
  s.adapts(int32_t(y.width), 0, int32_t(h.width));
  return std::make_unique<LoraUp>(s.step.index, h, y);
}

}  // namespace dso
