// Reads one dso_step and checks every field that is used; records what a step reads and writes for the interpreter.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "batch.hpp"
#include "dso.h"
#include "kernels.hpp"
#include "layout.hpp"

namespace dso {

class AttentionSchedule;
class BlockSchedule;
class IndexSchedule;
class MlaSchedule;
class ExpertGroups;
class ProcessGroup;

struct PlanSource {  // the arguments of dso_plan_create, and what the steps so far require of batches
  const dso_slot* slots;
  int32_t n_slots;
  const dso_weight* weights;
  int32_t n_weights;
  int32_t vocab_size;
  const Kernels& kernels;
  BatchNeeds needs;
  std::vector<bool> written;                                  // slots that an earlier step writes
  std::vector<std::shared_ptr<AttentionSchedule>> schedules;  // shared by layers of the same shape
  std::vector<std::shared_ptr<BlockSchedule>> block_schedules;
  std::vector<std::shared_ptr<IndexSchedule>> index_schedules;
  std::vector<std::shared_ptr<MlaSchedule>> mla_schedules;
  std::vector<std::shared_ptr<ExpertGroups>> groups;  // shared by the steps over one slot of routes
  std::shared_ptr<std::vector<int32_t>> sites_after;  // of the LORA_DOWN steps since the last product with adapters
  std::shared_ptr<ProcessGroup> group;                // null: there is none
  int32_t published = -1;                             // slot whose rows are exchanged but not yet received; -1: none
  int64_t published_width = 0;
  bool published_selected = false;
  bool exchanges = false;  // whether a step uses the group
};

struct SlotRef {
  int32_t index = -1, kind = 0;
  int64_t width = 0;
  bool selected = false;
  int64_t repeat = 1;
};

constexpr int32_t kMostExperts = 1 << 14;  // expert indices are exact in fp32

struct Chosen {  // top_k of `experts` chosen per row
  int64_t experts, top_k;
  bool operator==(const Chosen&) const = default;
};

enum SlotKinds { kF32Only, kInteger, kConverted, kAnyKind };  // kConverted: BF16, Q8, Q16

class StepReader {
 public:
  StepReader(PlanSource& plan, const dso_step& step, int32_t index);

  const dso_step& step;

  SlotRef in(int i, SlotKinds kinds, int64_t width = 0, int64_t repeat = 1);  // width 0: any
  SlotRef token_rows(int i, int64_t width = 0);                               // in(i) in fp32, for all tokens
  SlotRef activations(const Matrix& w, int64_t repeat = 1);                   // in(0), of a kind that products with w read
  SlotRef out(int i, SlotKinds kinds, int64_t width, bool selected, int64_t repeat = 1);  // arguments as for in
  Matrix matrix(int i) const;
  Stack stack(int i, int64_t count) const;
  const float* vector(int field_w_or_b, int i, int64_t cols) const;  // 'w' or 'b'
  int64_t vector_size(int i) const;                                  // of w[i]
  const float* bias(int i, int64_t rows) const;                      // null if b[i] is -1
  bool has_weight(int i) const { return step.w[i] != -1; }
  int32_t positive(const char* field, int32_t value) const;
  float eps() const;
  Chosen chosen() const;                                                         // fields experts and top_k
  void attends(int32_t layer, int32_t kv_heads, int32_t head_dim, bool writes);  // uses the cache
  void attends_latent(int32_t layer, int32_t rank, int32_t rope, bool writes);
  void attends_index(int32_t layer, int32_t index, bool writes);
  // A kind of rows; window: tokens whose rows are read, 0: all. plain: read as fp32 or bf16. `writes` does not see any.
  void attends_rows(int32_t kind, int64_t width, int64_t every, int64_t window, bool plain);
  void writes_rows(int32_t kind, int64_t width, int64_t every);
  void sees(int64_t window, int64_t sinks);                      // visible tokens of its layer, after `attends`; window 0: all
  int32_t has_state(int64_t heads, int64_t rows, int64_t cols);  // field state: no other step has the same one
  void adapts(int32_t site, const dso_adapter_site& shape, int32_t rank);  // rows or cols 0: another step of it has the number
  void uses_shared() { writes.push_back(shared_resource()); }
  // The step uses at most these; a field set beyond them is an error in the plan.
  void takes(int ins, int outs, int ws, int bs, int32_t flags) const;
  void alias_only(const SlotRef& out, const SlotRef& in);  // `out` must not alias any input except this one
  PlanSource& plan() { return plan_; }
  [[noreturn]] void refuse(const char* format, ...) const __attribute__((format(printf, 2, 3)));
  std::string name() const;  // "step 3 (LINEAR)"

  std::vector<int32_t> reads, writes;  // slots; then the shared memory, then one per layer of the cache
  int32_t shared_resource() const { return plan_.n_slots; }
  void done();  // marks its outputs as written

 private:
  SlotRef slot(const char* field, int i, int32_t index, SlotKinds kinds) const;
  const dso_weight& weight(char field, int i) const;
  void uses_layer(int32_t layer, bool writes);
  void uses_rows(int32_t kind, int64_t width, int64_t every, bool writes);

  PlanSource& plan_;
  const int32_t index_;
};

}  // namespace dso
