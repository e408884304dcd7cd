// How long a thread spins before it sleeps.
#pragma once
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

}  // namespace dso
