// Waiting for another thread, or for another process: first spinning for tens of microseconds, then asleep in the kernel.
#pragma once
#include <atomic>
#include <cstdint>

namespace dso {

constexpr double kSpinSeconds = 40e-6;  // waking up costs more than most stages of a decode step

// Ticks of the time stamp counter. Unlike `pause`, reading it takes the same time on every CPU.
uint64_t spin_ticks(double seconds);

enum class Waiters { kThreads, kProcesses };  // of this process, or of all processes that share the word's memory

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex word");

// Sleeps while the word has this value; may return earlier. seconds: at most so long; 0: without a limit.
void sleep_while(std::atomic<uint32_t>* word, uint32_t value, Waiters waiters, double seconds = 0);
void wake_all(std::atomic<uint32_t>* word, Waiters waiters);

}  // namespace dso
