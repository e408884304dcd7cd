// The Mersenne Twister (Matsumoto and Nishimura 1998) as torch's generator uses it: a 64-bit number is two outputs, the first
// in its upper half.
#pragma once
#include <cstdint>

#include "dso.h"

namespace dso {

class Mt19937 {
 public:
  explicit Mt19937(const dso_mt19937& state);
  dso_mt19937 state() const { return s_; }
  int64_t drawn() const { return drawn_; }  // 64-bit numbers since the construction or the last mark()
  void mark() { drawn_ = 0; }
  void skip_to(int64_t number);  // so that drawn() is `number`, which is not below it
  double uniform();              // in [0, 1), from the lower 53 bits of a number

 private:
  void twist();
  uint32_t output();

  dso_mt19937 s_;
  int64_t drawn_ = 0;
};

}  // namespace dso
