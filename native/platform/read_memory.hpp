// Reads memory as fast as this CPU can, to measure the memory's bandwidth.
#pragma once
#include <cstdint>
#include <cstring>

namespace dso {

constexpr int64_t kReadStride = 512;  // bytes per iteration of the loop; ranges are multiples of it

using ReadMemory = int64_t (*)(const uint8_t* begin, const uint8_t* end);

// With the widest loads of this CPU, whatever the context's ISA: narrow loads keep too few cache lines in flight to saturate
// the memory bus. The result depends on all that was read.
ReadMemory widest_reads();

// One accumulator per load, so that no load waits for another. Always inlined: compiled for the ISA of its caller.
template <class Vector>
[[gnu::always_inline]] inline int64_t read_memory(const uint8_t* begin, const uint8_t* end) {
  constexpr int64_t kLoads = 8;
  static_assert(kReadStride % (kLoads * sizeof(Vector)) == 0);
  Vector sum[kLoads] = {};
  for (const uint8_t* p = begin; p < end; p += kLoads * sizeof(Vector))
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLoads; ++i) {
      Vector x;  // copied, since a caller's memory may begin anywhere
      std::memcpy(&x, p + i * int64_t(sizeof(Vector)), sizeof(Vector));
      sum[i] ^= x;
    }
#pragma GCC unroll 8
  for (int64_t i = 1; i < kLoads; ++i) sum[0] ^= sum[i];
  return sum[0][0];
}

}  // namespace dso
