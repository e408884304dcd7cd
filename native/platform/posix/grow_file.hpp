// Implemented per system, for memory.cpp.
#pragma once
#include <cstdint>

namespace dso {

// Makes a range of a file exist and reserves its storage; what it holds already stays. Returns 0 or an errno code.
int grow_file(int fd, int64_t offset, int64_t bytes);

}  // namespace dso
