#pragma once
#include <cstdint>

namespace dso {

// ISB rather than YIELD, which most cores treat as a no-op: it delays about as long as x86's PAUSE.
inline void relax() { __asm__ volatile("isb" ::: "memory"); }
inline uint64_t ticks() {
  uint64_t count;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
}

struct FloatControl {
  using Bits = uint64_t;  // FPCR
  static constexpr Bits kStandard = 0, kFlushing = 1u << 24;
  static Bits get() {
    Bits bits;
    __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  static void set(Bits bits) { __asm__ volatile("msr fpcr, %0" ::"r"(bits) : "memory"); }
};

}  // namespace dso
