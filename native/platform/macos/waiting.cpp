#include "../waiting.hpp"

#include <algorithm>

// <os/os_sync_wait_on_address.h> of macOS 14.4, which older SDKs lack.
extern "C" {
int os_sync_wait_on_address(void* address, uint64_t value, size_t bytes, uint32_t flags);
int os_sync_wait_on_address_with_timeout(void* address, uint64_t value, size_t bytes, uint32_t flags, uint32_t clock,
                                         uint64_t nanoseconds);
int os_sync_wake_by_address_all(void* address, size_t bytes, uint32_t flags);
}

namespace dso {
namespace {

constexpr uint32_t kMonotonicClock = 32;  // OS_CLOCK_MACH_ABSOLUTE_TIME

uint32_t flags(Waiters waiters) { return waiters == Waiters::kProcesses ? 1 : 0; }  // OS_SYNC_WAIT_ON_ADDRESS_SHARED

}  // namespace

void wait_while(std::atomic<uint32_t>& word, uint32_t value, Waiters waiters, double seconds) {
  if (seconds > 0)
    os_sync_wait_on_address_with_timeout(&word, value, sizeof word, flags(waiters), kMonotonicClock,
                                         std::max(uint64_t(1), uint64_t(seconds * 1e9)));
  else
    os_sync_wait_on_address(&word, value, sizeof word, flags(waiters));
}

void wake_all(std::atomic<uint32_t>& word, Waiters waiters) { os_sync_wake_by_address_all(&word, sizeof word, flags(waiters)); }

}  // namespace dso
