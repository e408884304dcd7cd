// Threads that sleep until a word in memory changes (Linux: futex).
#pragma once
#include <atomic>
#include <cstdint>

namespace dso {

void wait_while(std::atomic<uint32_t>& word, uint32_t value);  // returns at once if it differs; may return early
void wake_all(std::atomic<uint32_t>& word);

}  // namespace dso
