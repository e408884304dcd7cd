// A plan and its interpreter. Steps that do not depend on each other form a stage, whose tasks all threads share. So do
// successive steps over the same rows, even if they depend on each other: a task runs all of them on a block of rows, which
// stays in the cache. Short steps run between stages, on the thread that finished the last one.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "context.hpp"
#include "op.hpp"
#include "red_zones.hpp"
#include "step_reader.hpp"

struct dso_plan final : private dso::Job {
 public:
  dso_plan(std::shared_ptr<dso::Context> context, const dso_step* steps, int32_t n_steps, const dso_slot* slots,
           int32_t n_slots, const dso_weight* weights, int32_t n_weights, int32_t vocab_size);

  void run(const dso_batch& batch);
  void check_batch(const dso_batch& batch) const;  // Error if `run` would refuse it
  const dso::Kernels& kernels() const { return context_->kernels; }
  int32_t vocab_size() const { return vocab_size_; }
  int64_t hidden_width() const { return needs_.hidden_width; }  // of the last hidden state; 0: there is none
  int64_t draft_width() const { return needs_.draft_width; }    // of DRAFT_OUT; 0: there is none
  // What a plan that drafts with this one's results reads: those of DRAFT_OUT, or, without that step, the last hidden states.
  int64_t next_states_width() const { return draft_width() > 0 ? draft_width() : hidden_width(); }
  float* next_states(const dso_batch& batch) const { return draft_width() > 0 ? batch.draft_states : batch.last_hidden; }
  const char* next_states_name() const { return draft_width() > 0 ? "draft_states" : "last_hidden"; }
  bool has_states() const { return !needs_.recurrent.empty(); }
  void check_weights() const;  // Error if a mapped file that contains some of them has changed
  void reserve(int64_t T, int64_t R);
  int64_t buffer_bytes(int64_t T, int64_t R) const;  // of the slots, without the gaps of a checked context

  dso_run_counts counts() const;  // of the last run; waits for one that is under way

  void set_timing(bool on);
  void timing(double* seconds_per_step, int64_t* runs) const;

 private:
  struct Step {
    std::unique_ptr<dso::Op> op;
    std::vector<int32_t> reads, writes;
    int32_t code = 0;  // DSO_OP_*
    double seconds = 0;
  };
  struct Stage {
    int32_t begin, shared, end;  // steps [begin, shared) are run by the thread that opens the stage, [shared, end) by all
    dso::RowOp* rows;            // the first of the shared steps, if they are run block of rows by block of rows; else null
  };

  void reshape();
  void make_stages();
  void place(int64_t T, int64_t R);
  int64_t next() override;
  int64_t node_end(int node) const override;
  void task(int64_t index, int thread) override;
  void task_of_node(const Stage& stage, int64_t index, int thread);  // with several memory nodes
  void place_memory(dso::Team& team, dso_cache* cache);
  void took(int32_t step);                                            // timing: the step has just ended
  int64_t slot_bytes(const dso_slot& s, int64_t T, int64_t R) const;  // including the gap after it
  int64_t slots_bytes(int64_t T, int64_t R) const;
  void look(int32_t begin, int32_t end);  // checks the red zones after steps [begin, end)
  [[noreturn]] void fail_overwritten() const;

  const std::shared_ptr<dso::Context> context_;
  std::shared_ptr<dso::ProcessGroup> group_;  // that its steps exchange rows with; null: none
  const int32_t vocab_size_;
  std::vector<dso_slot> slots_;
  std::vector<const void*> mapped_;  // starts of the mapped files that contain weights
  dso::BatchNeeds needs_;
  std::vector<Step> steps_;
  int32_t resources_ = 0;  // what steps may depend on: slots, the shared memory, layers of the cache

  dso::Run run_;
  dso::Arena arena_;
  std::vector<Stage> stages_;
  size_t stage_ = 0;  // the stage that next() opens
  struct Shape {
    int64_t T = -1, R = -1, decode_rows = -1, decode_logits = -1;
    bool hidden = false, last_hidden = false, draft_states = false, adapted = false;
    bool operator==(const Shape&) const = default;
  } shape_;

  const bool checked_;
  const int64_t gap_;    // bytes after each buffer
  dso::RedZones zones_;  // numbered: slots, then the shared memory, then the threads' scratch
  dso::RedZones::Found found_;
  int32_t found_begin_ = 0, found_end_ = 0;  // the steps after which the overwrite was found

  int64_t handovers_ = 0;  // of the last run: stages that threads shared, each a hand-over from one thread to all
  int64_t slept_ = 0;      // how often a thread slept
  bool placed_ = false;
  dso::Placement placement_;  // of the weights, since the first run

  bool timing_ = false;
  int64_t runs_ = 0;
  double mark_ = 0;  // start time of the step being timed
};
