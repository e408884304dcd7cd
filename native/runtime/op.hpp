// The interface of a step to the interpreter: a number of independent tasks for the current batch, each run by whichever thread
// takes it. Tasks never split a sum, so results do not depend on the assignment.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "batch.hpp"
#include "kernels.hpp"
#include "layout.hpp"
#include "node_memory.hpp"
#include "thread_places.hpp"

namespace dso {

struct Rows {  // rows of a slot in this run
  uint8_t* data;
  int64_t stride;  // bytes
  int64_t count;
  uint8_t* row(int64_t i) const { return data + i * stride; }
  float* f32(int64_t i) const { return reinterpret_cast<float*>(row(i)); }
};

struct Run {  // one dso_plan_run
  const Kernels& kernels;
  const ThreadPlaces& places;
  const int threads;
  Batch batch;
  std::vector<Rows> slots;
  uint8_t* scratch = nullptr;  // of thread 0; the other threads' follow
  int64_t scratch_stride = 0;
  uint8_t* shared = nullptr;  // of the step, for all threads: attention's partial results

  uint8_t* thread_scratch(int thread) const { return scratch + thread * scratch_stride; }
};

class RowOp;

class Op {
 public:
  virtual ~Op() = default;
  // Called when T, R or the decode rows differ from the last run's: decides how the work is split.
  virtual void shape(const Run& run) = 0;
  // Elements touched: below kSerialWork one thread does all of it, while the next stage is opened.
  virtual int64_t work(const Run& run) const = 0;
  virtual int64_t tasks(const Run& run) const = 0;
  virtual void task(const Run& run, int64_t index, int thread) = 0;
  // Called before the slots have addresses: only their row counts are known.
  virtual int64_t scratch_bytes(const Run&) const { return 0; }  // private to a thread
  virtual int64_t shared_bytes(const Run&) const { return 0; }
  // Called by the calling thread before every run starts.
  virtual void prepare(const Run&) {}
  // Whether this run needs nothing from the step, such as hidden states that were not requested.
  virtual bool idle(const Run& run) const { return tasks(run) == 0; }
  // Called once all inputs are ready, by the one thread that opens its stage, before its tasks are counted: for work whose
  // split depends on data, such as the chosen experts.
  virtual void open(const Run&) {}
  // With several memory nodes: tasks [node_end(run, i - 1), node_end(run, i)) read weights of node i, and its threads run them.
  // The tasks after those of the last node are run by any thread.
  virtual int64_t node_end(const Run&, int) const { return 0; }
  // Adds what these tasks read, whatever the batch.
  virtual void weights_of_nodes(const ThreadPlaces&, std::vector<NodeRange>&) const {}
  // The step, if each row that it writes depends on the same row of the slots that it reads, and on no other; else null.
  virtual RowOp* by_rows() { return nullptr; }
};

constexpr int64_t kSerialWork = 8192;

// The existing schedule of this shape, which layers of the same shape share, or a new one.
template <class Schedule, class Shape>
std::shared_ptr<Schedule> shared_schedule(std::vector<std::shared_ptr<Schedule>>& known, const Shape& shape) {
  const auto alike = std::find_if(known.begin(), known.end(), [&](const auto& k) { return k->shape == shape; });
  return alike != known.end() ? *alike : known.emplace_back(std::make_shared<Schedule>(shape));
}

// Rows split into blocks large enough for a task.
class RowOp : public Op {
 public:
  void shape(const Run& run) override {
    rows_ = rows(run);
    block_ = std::clamp<int64_t>(kSerialWork / std::max<int64_t>(1, row_work()), 1, std::max<int64_t>(1, rows_ / run.threads));
  }
  int64_t work(const Run& run) const override { return rows(run) * row_work(); }
  int64_t tasks(const Run&) const override { return ceil_div(rows_, block_); }
  void task(const Run& run, int64_t index, int thread) override { some(run, index * block_, block_, thread); }

  int64_t count() const { return rows_; }
  int64_t block() const { return block_; }  // rows of a task
  void some(const Run& run, int64_t begin, int64_t most, int thread) {
    const int64_t end = std::min(rows_, begin + most);
    for (int64_t r = begin; r < end; ++r) row(run, r, thread);
  }

 protected:
  virtual int64_t rows(const Run& run) const = 0;
  virtual int64_t row_work() const = 0;
  virtual void row(const Run& run, int64_t row, int thread) = 0;

 private:
  int64_t rows_ = 0, block_ = 1;
};

}  // namespace dso
