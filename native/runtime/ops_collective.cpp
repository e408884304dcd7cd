// Exchange of rows between the processes of a group: one op writes this process's part to the group's memory, the next one
// waits for the others' parts and adds or joins them.
#include <cstring>

#include "error.hpp"
#include "process_group.hpp"
#include "ops.hpp"

namespace dso {
namespace {

// The sum of parts that are read at their places has the same order in every process, so all have the same bits.
class SharedRows : public RowOp {
 public:
  SharedRows(std::shared_ptr<ProcessGroup> group, const SlotRef& slot) : group_(std::move(group)), slot_(slot) {}

 protected:
  int64_t rows(const Run& run) const override { return run.slots[slot_.index].count; }
  int64_t row_work() const override { return slot_.width; }
  float* part(int32_t rank, int64_t row, int64_t width) const {
    return reinterpret_cast<float*>(group_->part(rank)) + row * width;
  }

  // Memory for the widest part: the same in all processes, whose parts may have other widths.
  void reserve(const Run& run, int64_t width) const {
    group_->reserve(4 * width * (slot_.selected ? run.batch.R : run.batch.T));
  }

  template <class Width>
  void exchange(const Run& run, const Width& width) const {  // width: of a rank's part
    int64_t bytes[ProcessGroup::kMostRanks];
    for (int32_t k = 0; k < group_->ranks(); ++k) bytes[k] = 4 * rows(run) * width(k);
    group_->exchange(bytes);
  }

  const std::shared_ptr<ProcessGroup> group_;
  const SlotRef slot_;
};

class Publish final : public SharedRows {
 public:
  using SharedRows::SharedRows;
  void open(const Run&) override { group_->begin(); }

 private:
  void row(const Run& run, int64_t r, int) override {
    std::memcpy(part(group_->rank(), r, slot_.width), run.slots[slot_.index].f32(r), size_t(4 * slot_.width));
  }
};

class SumParts final : public SharedRows {
 public:
  using SharedRows::SharedRows;
  void prepare(const Run& run) override { reserve(run, slot_.width); }
  void open(const Run& run) override {
    exchange(run, [&](int32_t) { return slot_.width; });
  }

 private:
  void row(const Run& run, int64_t r, int) override {
    float* const sum = run.slots[slot_.index].f32(r);
    run.kernels.add(part(0, r, slot_.width), part(1, r, slot_.width), slot_.width, sum);
    for (int32_t k = 2; k < group_->ranks(); ++k) run.kernels.add(sum, part(k, r, slot_.width), slot_.width, sum);
  }
};

class JoinParts final : public SharedRows {
 public:
  JoinParts(std::shared_ptr<ProcessGroup> group, const SlotRef& out, int64_t each)
      : SharedRows(std::move(group), out), each_(each) {}
  void prepare(const Run& run) override { reserve(run, each_); }
  void open(const Run& run) override {
    exchange(run, [&](int32_t k) { return width(k); });
  }

 private:
  int64_t width(int32_t rank) const { return rank + 1 < group_->ranks() ? each_ : slot_.width - rank * each_; }
  void row(const Run& run, int64_t r, int) override {
    float* const all = run.slots[slot_.index].f32(r);
    for (int32_t k = 0; k < group_->ranks(); ++k) std::memcpy(all + k * each_, part(k, r, width(k)), size_t(4 * width(k)));
  }
  const int64_t each_;
};

std::shared_ptr<ProcessGroup> group_of(StepReader& s) {
  s.plan().exchanges = true;
  if (!s.plan().group) s.refuse("the plan's context has no group");
  return s.plan().group;
}

}  // namespace

std::unique_ptr<Op> make_publish(StepReader& s) {
  s.takes(1, 0, 0, 0, 0);
  const SlotRef in = s.in(0, kF32Only);
  s.uses_shared();
  if (s.plan().published >= 0) s.refuse("in[0] is published while no step has received slot %d yet", s.plan().published);
  s.plan().published = in.index;
  s.plan().published_width = in.width;
  s.plan().published_selected = in.selected;
  return std::make_unique<Publish>(group_of(s), in);
}

namespace {

// The output of the step that receives what the step before has published.
SlotRef received(StepReader& s) {
  s.takes(0, 1, 0, 0, 0);
  s.uses_shared();
  if (s.plan().published < 0) s.refuse("no step has published rows");
  s.plan().published = -1;
  return s.out(0, kF32Only, 0, s.plan().published_selected);
}

}  // namespace

std::unique_ptr<Op> make_sum_parts(StepReader& s) {
  const SlotRef out = received(s);
  if (out.width != s.plan().published_width)
    s.refuse("out[0] has width %lld, must be that of the published rows, %lld", (long long)out.width,
             (long long)s.plan().published_width);
  if (group_of(s)->ranks() < 2) s.refuse("the group has one process");
  return std::make_unique<SumParts>(group_of(s), out);
}

std::unique_ptr<Op> make_join_parts(StepReader& s) {
  const SlotRef out = received(s);
  const int64_t each = s.positive("offset", s.step.offset), last = out.width - each * (group_of(s)->ranks() - 1);
  const int64_t own = group_of(s)->rank() + 1 < group_of(s)->ranks() ? each : last;
  if (last < 1 || last > each || own != s.plan().published_width)
    s.refuse("offset is %lld: rows of width %lld, of which this process has %lld elements, cannot be divided so",
             (long long)each, (long long)out.width, (long long)s.plan().published_width);
  return std::make_unique<JoinParts>(group_of(s), out, each);
}

}  // namespace dso
