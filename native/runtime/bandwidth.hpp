// Measures the memory bandwidth of this machine: the limit of a decode step, which reads every weight once.
#pragma once
#include <cstdint>
#include <vector>

#include "context.hpp"

namespace dso {

// Bytes per second of all the context's threads together, each reading its share of `bytes` in order, repeatedly: the fastest
// of the rounds that fit into `seconds`, at least four. If `bytes` fits into a cache, that cache's bandwidth is measured.
double read_bandwidth(Context& c, int64_t bytes, double seconds);

struct MemoryRegion {
  const uint8_t* data;
  int64_t bytes;
};
// The same for memory of the caller, at least 1 MiB together. On machines whose memory is not equally fast everywhere, this is
// the limit of what reads just these regions.
double read_bandwidth(Context& c, const std::vector<MemoryRegion>& regions, double seconds);

}  // namespace dso
