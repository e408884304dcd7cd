// How long a thread spins before it sleeps.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "processor.hpp"

namespace dso {

constexpr double kSpinSeconds = 40e-6;  // waking up costs more than most stages of a decode step

// Ticks of the processor's counter. Unlike relax(), reading it takes the same time on every CPU.
inline uint64_t spin_ticks(double seconds) {
  static const double per_second = [] {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const uint64_t first = ticks();
    std::chrono::duration<double> passed{};
    while (passed.count() < 100e-6) passed = Clock::now() - start;
    return double(ticks() - first) / passed.count();
  }();
  return uint64_t(seconds * per_second);
}

template <class Ready>
bool spin_for(uint64_t longest, const Ready& ready) {  // for so many ticks; false: in vain
  for (const uint64_t start = ticks(); ticks() - start < longest;) {
    if (ready()) return true;
    relax();
  }
  return false;
}

// How long an exchange between processes spins before it sleeps. They have fixed shares of a stage's work, so they arrive
// farther apart than the threads of a pool. Less and less while it is in vain: with fewer cores than processes, the one that is
// waited for needs this core.
class ExchangeSpin {
 public:
  template <class Ready>
  bool operator()(const Ready& ready) {
    const bool there = spin_for(ticks_, ready);
    ticks_ = there ? std::min(ticks_ + ticks_ / 8, most_) : std::max(ticks_ / 2, least_);
    return there;
  }

 private:
  const uint64_t least_ = spin_ticks(kSpinSeconds), most_ = spin_ticks(300e-6);
  uint64_t ticks_ = most_;
};

}  // namespace dso
