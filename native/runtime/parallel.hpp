// Runs calls outside a plan on a context's threads: stages of independent tasks, one after the other.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "context.hpp"

namespace dso {

struct Stage {
  int64_t tasks;
  std::function<void(int64_t index, int thread)> task;  // must not throw
};

class Stages final : public Job {
 public:
  explicit Stages(std::vector<Stage> stages) : stages_(std::move(stages)) {}
  int64_t next() override { return opened_ == stages_.size() ? -1 : stages_[opened_++].tasks; }
  void task(int64_t index, int thread) override { stages_[opened_ - 1].task(index, thread); }

 private:
  const std::vector<Stage> stages_;
  size_t opened_ = 0;
};

inline void parallel(Context& c, int64_t tasks, std::function<void(int64_t, int)> task) {
  ThreadPool::Lease lease(c.pool);
  Stages stages({{tasks, std::move(task)}});
  lease.team().run(stages);
}

}  // namespace dso
