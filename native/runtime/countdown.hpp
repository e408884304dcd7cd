// Counts down to the last of several tasks that compute one result together, so that the last one to finish continues with the
// whole result, without a stage in between.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace dso {

class Countdowns {
 public:
  void reset(size_t most) {  // clears all countdowns; makes room for this many
    used_ = 0;
    if (all_.size() < most) all_ = std::vector<One>(most + most / 2);
  }
  int32_t add(int32_t tasks = 0) {
    const int32_t i = used_++;
    all_[i].total = tasks;
    all_[i].left.store(tasks, std::memory_order_relaxed);
    return i;
  }
  void expect(int32_t i, int32_t more) {
    all_[i].total += more;
    all_[i].left.store(all_[i].total, std::memory_order_relaxed);
  }
  // True for the one caller that completes countdown `i`; the countdown then restarts, for the next layer.
  bool last(int32_t i) {
    One& c = all_[i];
    if (c.left.fetch_sub(1, std::memory_order_acq_rel) != 1) return false;
    c.left.store(c.total, std::memory_order_relaxed);  // published by the next stage
    return true;
  }

 private:
  struct One {
    std::atomic<int32_t> left{0};
    int32_t total = 0;
  };
  int32_t used_ = 0;
  std::vector<One> all_;
};

}  // namespace dso
