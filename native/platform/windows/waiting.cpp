#include "../waiting.hpp"

#include <windows.h>

#include <algorithm>
#include <cmath>

namespace dso {

// The system's waiting on addresses is for threads of one process. Between processes this looks every millisecond, after those
// who wait have spun (spinning.hpp).
void wait_while(std::atomic<uint32_t>& word, uint32_t value, Waiters waiters, double seconds) {
  const DWORD limit = seconds > 0 ? DWORD(std::clamp(std::ceil(seconds * 1e3), 1.0, 1e9)) : INFINITE;
  if (waiters == Waiters::kThreads)
    WaitOnAddress(&word, &value, sizeof value, limit);
  else if (word.load() == value)
    Sleep(1);
}

void wake_all(std::atomic<uint32_t>& word, Waiters waiters) {
  if (waiters == Waiters::kThreads) WakeByAddressAll(&word);
}

}  // namespace dso
