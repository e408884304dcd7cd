// Counts down to the last of several tasks that make one thing together, so that whoever ends last goes on with the whole: no
// stage in between.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace dso {

class Countdowns {
 public:
  void reset(size_t most) {  // forgets all; room for so many
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
  // True for the one caller that completes what countdown `i` waits for; it then starts anew, for the next layer.
  bool last(int32_t i) {
    One& c = all_[i];
    if (c.left.fetch_sub(1, std::memory_order_acq_rel) != 1) return false;
    c.left.store(c.total, std::memory_order_relaxed);  // the next stage publishes it
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
