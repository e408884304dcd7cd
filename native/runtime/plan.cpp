#include "plan.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

#include "cache.hpp"
#include "error.hpp"
#include "mapped_files.hpp"
#include "ops.hpp"

using namespace dso;

namespace {

constexpr int32_t kMostSteps = 1 << 20, kMostSlots = 1 << 20, kMostRepeat = 1 << 12;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int64_t slot_rows(const dso_slot& s, int64_t T, int64_t R) { return (s.selected ? R : T) * std::max(1, s.repeat); }

void check_slots(const dso_slot* slots, int32_t n, int32_t vocab_size) {
  for (int32_t i = 0; i < n; ++i) {
    const dso_slot& s = slots[i];
    if (row_bytes(s.kind, 32) < 0) fail(DSO_EINVAL, "slot %d: kind %d is unknown", i, s.kind);
    if (row_bytes(s.kind, s.width) < 0) fail(DSO_EINVAL, "slot %d: width is %d, out of range", i, s.width);
    if (s.selected != 0 && s.selected != 1) fail(DSO_EINVAL, "slot %d: selected is %d, must be 0 or 1", i, s.selected);
    if (s.repeat < 0 || s.repeat > kMostRepeat) fail(DSO_EINVAL, "slot %d: repeat is %d, out of range", i, s.repeat);
    if (s.kind == DSO_SLOT_LOGITS && (s.width != vocab_size || !s.selected || s.repeat > 1))
      fail(DSO_EINVAL, "slot %d: LOGITS must be selected rows of vocab_size %d, not width %d", i, vocab_size, s.width);
  }
}

}  // namespace

dso_plan::dso_plan(std::shared_ptr<Context> context, const dso_step* steps, int32_t n_steps, const dso_slot* slots,
                   int32_t n_slots, const dso_weight* weights, int32_t n_weights, int32_t vocab_size)
    : context_(std::move(context)),
      vocab_size_(vocab_size),
      run_{context_->kernels, context_->pool.places(), context_->pool.threads(), {}, {}},
      checked_(Arena::kGap == 0 && context_->checked),  // AddressSanitizer itself checks the gaps
      gap_(checked_ ? RedZones::kBytes : Arena::kGap) {
  if (n_steps < 1 || n_steps > kMostSteps || !steps) fail(DSO_EINVAL, "n_steps is %d, out of range, or steps is NULL", n_steps);
  if (n_slots < 1 || n_slots > kMostSlots || !slots) fail(DSO_EINVAL, "n_slots is %d, out of range, or slots is NULL", n_slots);
  if (n_weights < 0 || (n_weights > 0 && !weights))
    fail(DSO_EINVAL, "n_weights is %d, out of range, or weights is NULL", n_weights);
  if (vocab_size < 1) fail(DSO_EINVAL, "vocab_size is %d, must be at least 1", vocab_size);
  check_slots(slots, n_slots, vocab_size);
  slots_.assign(slots, slots + n_slots);
  for (int32_t i = 0; i < n_weights; ++i) {
    const void* const mapping = mapping_of(weights[i].data);
    if (mapping && std::find(mapped_.begin(), mapped_.end(), mapping) == mapped_.end()) mapped_.push_back(mapping);
  }

  PlanSource source{slots, n_slots, weights, n_weights, vocab_size, context_->kernels, {}, std::vector<bool>(n_slots), {},
                    {},    {},      {},      {},        {},         context_->group};
  for (const dso_slot& s : slots_) source.needs.logits |= s.kind == DSO_SLOT_LOGITS;
  for (int32_t i = 0; i < n_steps; ++i) {
    StepReader reader(source, steps[i], i);
    std::unique_ptr<Op> op = make_op(reader);
    reader.done();
    steps_.push_back({std::move(op), std::move(reader.reads), std::move(reader.writes), steps[i].op});
  }
  if (source.published >= 0) fail(DSO_EINVAL, "slot %d is published, but no step receives it", source.published);
  if (source.exchanges) group_ = source.group;
  needs_ = source.needs;
  resources_ = n_slots + 1 + int32_t(needs_.layers);
  run_.slots.resize(n_slots);
}

int64_t dso_plan::slot_bytes(const dso_slot& s, int64_t T, int64_t R) const {
  if (s.kind == DSO_SLOT_LOGITS) return 0;  // provided by the caller
  return round_up(row_bytes(s.kind, s.width) * slot_rows(s, T, R), 64) + gap_;
}

int64_t dso_plan::slots_bytes(int64_t T, int64_t R) const {
  int64_t bytes = 0;
  for (const dso_slot& s : slots_) bytes += slot_bytes(s, T, R);
  return bytes;
}

int64_t dso_plan::buffer_bytes(int64_t T, int64_t R) const {
  int64_t gaps = 0;
  for (const dso_slot& s : slots_) gaps += s.kind == DSO_SLOT_LOGITS ? 0 : gap_;
  return slots_bytes(T, R) - gaps;
}

// Offsets of the slots, the shared memory and the threads' scratch; the sizes of the latter depend on the batch.
void dso_plan::place(int64_t T, int64_t R) {
  int64_t shared = 0, scratch = 64;
  for (const Step& s : steps_) {
    shared = std::max(shared, s.op->shared_bytes(run_));
    scratch = std::max(scratch, s.op->scratch_bytes(run_));
  }
  const int64_t slots = round_up(slots_bytes(T, R), 4096), shared_at = slots;
  run_.scratch_stride = round_up(scratch + gap_, 4096);
  const int64_t scratch_at = round_up(shared_at + shared + gap_, 4096);
  arena_.reserve(scratch_at + run_.scratch_stride * run_.threads);
  arena_.close();
  zones_.clear();
  auto give = [&](int64_t from, int64_t bytes, int64_t number) {
    arena_.allow(from, bytes);
    if (checked_) zones_.add(arena_.data() + from + bytes, int32_t(number));
  };
  int64_t at = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const dso_slot& s = slots_[i];
    run_.slots[i] = {arena_.data() + at, row_bytes(s.kind, s.width), slot_rows(s, T, R)};
    if (slot_bytes(s, T, R) > 0) give(at, slot_bytes(s, T, R) - gap_, int64_t(i));
    at += slot_bytes(s, T, R);
  }
  give(shared_at, shared, int64_t(slots_.size()));
  for (int t = 0; t < run_.threads; ++t) give(scratch_at + t * run_.scratch_stride, scratch, int64_t(slots_.size()) + 1 + t);
  run_.shared = arena_.data() + shared_at;
  run_.scratch = arena_.data() + scratch_at;
}

void dso_plan::reserve(int64_t T, int64_t R) {
  if (T < 0 || R < 0 || R > T)
    fail(DSO_EINVAL, "reserve: T is %lld, R is %lld: must be 0 <= R <= T", (long long)T, (long long)R);
  ThreadPool::Lease lease(context_->pool);
  arena_.reserve(slots_bytes(T, R));
}

void dso_plan::reshape() {
  const Batch& b = run_.batch;
  const Shape shape{b.T,
                    b.R,
                    b.decode_rows,
                    b.decode_logits,
                    b.source->hidden != nullptr,
                    b.source->last_hidden != nullptr,
                    b.source->draft_states != nullptr,
                    !b.adapted.empty()};
  if (shape == shape_) return;
  shape_ = {};  // until all of it is up to date
  for (size_t i = 0; i < slots_.size(); ++i) run_.slots[i].count = slot_rows(slots_[i], b.T, b.R);
  for (Step& s : steps_) s.op->shape(run_);
  make_stages();
  shape_ = shape;
}

// A step joins the stage unless it reads what another shared step of the stage writes, or writes what another reads or writes.
// Steps over the same rows do so in any case, and only they join a stage of such steps. A step with little work is run when the
// stage is opened, so it goes before the shared ones or into a new stage.
void dso_plan::make_stages() {
  stages_.clear();
  std::vector<bool> read(resources_), written(resources_);  // by the shared steps of the stage
  for (int32_t i = 0; i < int32_t(steps_.size()); ++i) {
    const Step& s = steps_[i];
    if (s.op->idle(run_)) continue;
    const bool serial = s.op->work(run_) < kSerialWork;
    RowOp* const rows = serial ? nullptr : s.op->by_rows();
    const bool shared = !stages_.empty() && stages_.back().shared < stages_.back().end;
    const bool follows = shared && !timing_ && rows && stages_.back().rows && rows->count() == stages_.back().rows->count();
    bool fresh = stages_.empty() || (shared && (serial || timing_ || stages_.back().rows));  // timed steps: a stage each
    for (int32_t r : s.reads) fresh |= written[r];
    for (int32_t w : s.writes) fresh |= written[w] || read[w];
    if (fresh && !follows) {
      stages_.push_back({i, i, i, nullptr});
      read.assign(resources_, false);
      written.assign(resources_, false);
    }
    Stage& stage = stages_.back();
    if (!serial && stage.shared == stage.end) stage.rows = rows;
    stage.end = i + 1;
    if (serial) {
      stage.shared = i + 1;
      continue;
    }
    for (int32_t r : s.reads) read[r] = true;
    for (int32_t w : s.writes) written[w] = true;
  }
}

void dso_plan::check_weights() const {
  for (const void* mapping : mapped_) check_intact(mapping);
}

void dso_plan::run(const dso_batch& batch) {
  ThreadPool::Lease lease(context_->pool);
  if (!mapped_.empty()) keep_handler();
  run_.batch.set(batch, needs_);
  if (run_.places.split()) place_memory(lease.team(), batch.cache);
  if (group_) group_->check_alive();
  for (Step& s : steps_) s.op->prepare(run_);
  reshape();
  place(run_.batch.T, run_.batch.R);
  for (size_t i = 0; i < slots_.size(); ++i)
    if (slots_[i].kind == DSO_SLOT_LOGITS)
      run_.slots[i] = {reinterpret_cast<uint8_t*>(batch.logits), 4 * int64_t(slots_[i].width), run_.batch.R};

  stage_ = 0;
  found_ = {};
  if (timing_) mark_ = now();
  const int64_t stages = lease.team().stages(), sleeps = lease.team().sleeps();
  lease.team().run(*this);
  handovers_ = lease.team().stages() - stages;
  slept_ = lease.team().sleeps() - sleeps;
  if (group_) group_->check_alive();  // otherwise parts may be missing
  if (found_.zone >= 0) fail_overwritten();
  check_weights();
  runs_ += timing_;
}

void dso_plan::check_batch(const dso_batch& batch) const {
  Batch checked;
  checked.set(batch, needs_);
}

// Weights once, each cache once: a block of it has all heads, so its pages are not those of one node's heads.
void dso_plan::place_memory(Team& team, dso_cache* cache) {
  if (!placed_) {
    std::vector<NodeRange> ranges;
    for (const Step& s : steps_) s.op->weights_of_nodes(run_.places, ranges);
    placement_ = place_pages(team, run_.places, *context_->memory, std::move(ranges), context_->copies_mapped);
    placed_ = true;
  }
  if (cache && !std::exchange(cache->interleaved, true)) {
    std::vector<int32_t> nodes;
    for (const ThreadPlaces::Node& n : run_.places.nodes) nodes.push_back(n.node);
    context_->memory->interleave(cache->arena.data(), cache->arena.size(), nodes);
  }
}

int64_t dso_plan::next() {
  if (timing_ && stage_ > 0 && stages_[stage_ - 1].shared < stages_[stage_ - 1].end) took(stages_[stage_ - 1].end - 1);
  if (checked_ && stage_ > 0) look(stages_[stage_ - 1].shared, stages_[stage_ - 1].end);
  if (stage_ == stages_.size()) return -1;
  const Stage& stage = stages_[stage_++];
  for (int32_t i = stage.begin; i < stage.shared; ++i) {
    Op& op = *steps_[i].op;
    if (op.idle(run_)) continue;
    op.open(run_);
    const int64_t n = op.tasks(run_);
    for (int64_t t = 0; t < n; ++t) op.task(run_, t, 0);  // no other task is running, so any thread's scratch is free
    if (timing_) took(i);
    if (checked_) look(i, i + 1);
  }
  int64_t tasks = 0;
  for (int32_t i = stage.shared; i < stage.end; ++i) {
    if (steps_[i].op->idle(run_)) continue;
    steps_[i].op->open(run_);
    tasks += steps_[i].op->tasks(run_);
  }
  return stage.rows ? stage.rows->tasks(run_) : tasks;
}

// The shared tasks of a stage in order of the nodes, and within a node's in order of the steps.
int64_t dso_plan::node_end(int node) const {
  const Stage& stage = stages_[stage_ - 1];
  int64_t tasks = 0;
  for (int32_t i = stage.shared; !stage.rows && i < stage.end; ++i)
    if (!steps_[i].op->idle(run_)) tasks += steps_[i].op->node_end(run_, node);
  return tasks;
}

void dso_plan::task(int64_t index, int thread) {
  const Stage& stage = stages_[stage_ - 1];
  if (stage.rows) {
    const int64_t block = stage.rows->block();
    for (int32_t i = stage.shared; i < stage.end; ++i)
      if (!steps_[i].op->idle(run_)) steps_[i].op->by_rows()->some(run_, index * block, block, thread);
    return;
  }
  if (run_.places.split()) return task_of_node(stage, index, thread);
  for (int32_t i = stage.shared;; ++i) {
    const int64_t n = steps_[i].op->tasks(run_);
    if (index < n) return steps_[i].op->task(run_, index, thread);
    index -= n;
  }
}

void dso_plan::task_of_node(const Stage& stage, int64_t index, int thread) {
  const int nodes = run_.places.nodes_count();
  for (int k = 0;; ++k)  // the last round: tasks of no node
    for (int32_t i = stage.shared; i < stage.end; ++i) {
      Op& op = *steps_[i].op;
      if (op.idle(run_)) continue;
      const int64_t first = k == 0 ? 0 : op.node_end(run_, k - 1), end = k == nodes ? op.tasks(run_) : op.node_end(run_, k);
      if (index < end - first) return op.task(run_, first + index, thread);
      index -= end - first;
    }
}

void dso_plan::look(int32_t begin, int32_t end) {
  if (found_.zone >= 0 || (found_ = zones_.look()).zone < 0) return;
  found_begin_ = begin;
  found_end_ = end;
}

void dso_plan::fail_overwritten() const {
  const int64_t slots = int64_t(slots_.size());
  const std::string where = found_.zone < slots    ? text("slot %d", found_.zone)
                            : found_.zone == slots ? text("the shared memory of the steps")
                                                   : text("the scratch of thread %d", int(found_.zone - slots - 1));
  std::string which;
  for (int32_t i = found_begin_; i < found_end_; ++i)
    which += text("%s%d (op %d)", which.empty() ? "" : ", ", i, steps_[i].code);
  fail(DSO_ECHECK, "step %s wrote byte %d after the end of %s", which.c_str(), found_.byte, where.c_str());
}

void dso_plan::took(int32_t step) {
  const double end = now();
  steps_[step].seconds += end - mark_;
  mark_ = end;
}

dso_run_counts dso_plan::counts() const {
  ThreadPool::Lease lease(context_->pool);
  return {handovers_, slept_, placement_.pages.there, placement_.pages.moved, placement_.pages.stayed, placement_.copied};
}

void dso_plan::set_timing(bool on) {
  ThreadPool::Lease lease(context_->pool);
  timing_ = on;
  shape_ = {};  // timed steps do not share stages
  if (!on) return;
  runs_ = 0;
  for (Step& s : steps_) s.seconds = 0;
}

void dso_plan::timing(double* seconds_per_step, int64_t* runs) const {
  ThreadPool::Lease lease(context_->pool);
  for (size_t i = 0; i < steps_.size(); ++i) seconds_per_step[i] = steps_[i].seconds;
  *runs = runs_;
}
