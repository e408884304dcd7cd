// How fast this machine reads memory: what a decode step, which reads every weight once, is held against.
#pragma once
#include <cstdint>

#include "context.hpp"

namespace dso {

// Bytes a second of all the context's threads together, each reading a share of `bytes` in order, over and over: the fastest
// of the rounds that fit `seconds`, four at least. Within a cache's size that cache is what is measured.
double read_bandwidth(Context& c, int64_t bytes, double seconds);

}  // namespace dso
