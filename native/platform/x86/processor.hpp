#pragma once
#include <x86intrin.h>

#include <cstdint>

namespace dso {

inline void relax() { _mm_pause(); }
inline uint64_t ticks() { return __rdtsc(); }

struct FloatControl {
  using Bits = unsigned;  // MXCSR
  static constexpr Bits kStandard = 0x1f80, kFlushing = kStandard | 0x8040;
  static Bits get() { return _mm_getcsr(); }
  static void set(Bits bits) { _mm_setcsr(bits); }
};

}  // namespace dso
