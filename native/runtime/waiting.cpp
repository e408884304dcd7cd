#include "waiting.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include <chrono>
#include <climits>

namespace dso {

uint64_t spin_ticks(double seconds) {
  static const double per_second = [] {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    const uint64_t first = __rdtsc();
    std::chrono::duration<double> passed{};
    while (passed.count() < 100e-6) passed = Clock::now() - start;
    return double(__rdtsc() - first) / passed.count();
  }();
  return uint64_t(seconds * per_second);
}

void sleep_while(std::atomic<uint32_t>* word, uint32_t value, Waiters waiters, double seconds) {
  const int op = waiters == Waiters::kThreads ? FUTEX_WAIT_PRIVATE : FUTEX_WAIT;
  const timespec limit{time_t(seconds), long((seconds - double(time_t(seconds))) * 1e9)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, seconds > 0 ? &limit : nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>* word, Waiters waiters) {
  const int op = waiters == Waiters::kThreads ? FUTEX_WAKE_PRIVATE : FUTEX_WAKE;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace dso
