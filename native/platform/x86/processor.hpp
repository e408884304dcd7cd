#pragma once
#include <x86intrin.h>

#include <cstdint>

namespace dso {

inline void relax() { _mm_pause(); }
inline uint64_t ticks() { return __rdtsc(); }

class FloatSettings {
 public:
  using Bits = unsigned;  // MXCSR
  static constexpr Bits kStandard = 0x1f80, kFlushing = kStandard | 0x8040;
  static Bits get() { return _mm_getcsr(); }
  static void set(Bits bits) { _mm_setcsr(bits); }

  FloatSettings() { set(kStandard); }
  ~FloatSettings() { set(before_); }
  FloatSettings(const FloatSettings&) = delete;
  FloatSettings& operator=(const FloatSettings&) = delete;

 private:
  const Bits before_ = get();
};

}  // namespace dso
