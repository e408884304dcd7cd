// Open files, by descriptor.
#pragma once
#include <cstdint>

namespace dso {

struct FileState {
  int64_t bytes, modified_ns;
};

int duplicate_file(int fd);                    // not inherited by programs started later; -1 on failure, errno says why
void close_file(int fd);                       // of duplicate_file
bool state_of_file(int fd, FileState& state);  // false if it cannot be had

}  // namespace dso
