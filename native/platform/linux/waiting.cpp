#include "../waiting.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace dso {

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex word");

void wait_while(std::atomic<uint32_t>& word, uint32_t value, Waiters waiters, double seconds) {
  const int op = waiters == Waiters::kThreads ? FUTEX_WAIT_PRIVATE : FUTEX_WAIT;
  const timespec limit{time_t(seconds), long((seconds - double(time_t(seconds))) * 1e9)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, value, seconds > 0 ? &limit : nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word, Waiters waiters) {
  const int op = waiters == Waiters::kThreads ? FUTEX_WAKE_PRIVATE : FUTEX_WAKE;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace dso
