// Instructions of the processor that the runtime uses, all inline:
//   relax()           tells the core that this thread spins
//   ticks()           a counter that advances at the same rate on every core, whatever its clock
//   FloatControl      the register that sets how floats are rounded
//   FloatSettings     round to nearest, keep denormals, no traps, for as long as it lives: a task's bits must not depend on the
//                     thread that runs it, but a host may have set its thread to flush denormals (torch can, and so does
//                     loading a library built with -ffast-math)
#pragma once
#if defined(__x86_64__)
#include "x86/processor.hpp"
#elif defined(__aarch64__)
#include "arm/processor.hpp"
#else
#error "native/platform has no folder for this processor"
#endif

namespace dso {

class FloatSettings : public FloatControl {
 public:
  FloatSettings() { set(kStandard); }
  ~FloatSettings() { set(before_); }
  FloatSettings(const FloatSettings&) = delete;
  FloatSettings& operator=(const FloatSettings&) = delete;

 private:
  const Bits before_ = get();
};

}  // namespace dso
