// Threads and processes that sleep until a word in memory changes (Linux: futex).
#pragma once
#include <atomic>
#include <cstdint>

namespace dso {

enum class Waiters { kThreads, kProcesses };  // of this process, or of all processes that share the word's memory

// Sleeps while the word has this value; may return earlier. seconds: at most so long; 0: without a limit.
void wait_while(std::atomic<uint32_t>& word, uint32_t value, Waiters waiters, double seconds = 0);
void wake_all(std::atomic<uint32_t>& word, Waiters waiters);

}  // namespace dso
