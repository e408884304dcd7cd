// A plan and its interpreter. All threads walk the same list of steps; they meet only where a step depends on one since the
// last meeting, and short steps are done at the meeting itself, by the last thread to arrive.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "context.hpp"
#include "op.hpp"
#include "step_reader.hpp"

struct dso_plan {
 public:
  dso_plan(std::shared_ptr<dso::Context> context, const dso_step* steps, int32_t n_steps, const dso_slot* slots, int32_t n_slots,
           const dso_weight* weights, int32_t n_weights, int32_t vocab_size);

  void run(const dso_batch& batch);
  void reserve(int64_t T, int64_t R);
  int64_t buffer_bytes(int64_t T, int64_t R) const;

  void set_timing(bool on);
  void timing(double* seconds_per_step, int64_t* runs) const;

 private:
  struct Step {
    std::unique_ptr<dso::Op> op;
    std::vector<int32_t> reads, writes;
    double seconds = 0;
  };
  // Steps between two meetings: first those for the last thread to arrive, then those that all share out.
  struct Interval {
    int32_t begin, parallel, end;
  };

  void reshape();
  void make_intervals();
  void place(int64_t T, int64_t R);
  void walk(dso::Team& team, int thread);
  void open(const Interval& interval);                   // by one thread, while the others wait
  void close(const Interval& interval);                  // timing, likewise
  void share(const Interval& interval, int thread);

  struct alignas(64) Ticket {
    std::atomic<int64_t> next{0};
  };

  const std::shared_ptr<dso::Context> context_;
  std::vector<dso_slot> slots_;
  dso::BatchNeeds needs_;
  std::vector<Step> steps_;
  int32_t resources_ = 0;  // that steps may depend on: slots, the shared memory, layers of the cache

  dso::Run run_;
  dso::Arena arena_;
  std::vector<Interval> intervals_;
  std::vector<Ticket> tickets_;  // one for each parallel step of an interval
  struct Shape {
    int64_t T = -1, R = -1, decode_rows = -1, decode_logits = -1;
    bool hidden = false;
    bool operator==(const Shape&) const = default;
  } shape_;

  bool timing_ = false;
  int64_t runs_ = 0;
  double mark_ = 0;                // when the interval, or its last step that thread 0 has ended, began
  std::vector<double> step_ends_;  // of thread 0, in the interval
};
