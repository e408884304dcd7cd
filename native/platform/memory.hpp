// Memory directly from the system. On failure errno says why.
#pragma once
#include <cstdint>

namespace dso {

int64_t page_bytes();                             // 4096 on x86; up to 65536 on ARM
constexpr int64_t kHugePage = 2 << 20;            // what map_memory asks for, where the system has it
void* map_memory(int64_t bytes);                  // zeroed, resident when first touched; null on failure
void unmap_memory(void* begin, int64_t bytes);    // of map_memory and map_shared_file
bool discard_memory(void* begin, int64_t bytes);  // whole pages, which then read as zero
// A range of a file in memory that processes share; the file grows to hold it. Null on failure.
void* map_shared_file(int fd, int64_t offset, int64_t bytes);
bool map_zeros(uintptr_t begin, uintptr_t end);  // over whatever is mapped there; safe in a signal handler

}  // namespace dso
