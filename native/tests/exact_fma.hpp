// a * b + c, rounded once, on any C library: MinGW's fmaf rounds twice, and so differs from the processors' instructions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// The product of two floats fits a double, its sum with c not always. Where the sum is inexact, it is rounded to the neighbor
// whose last bit is odd: then rounding to float gives what one rounding would (Boldo and Melquiond, "Emulation of a FMA and
// correctly rounded sums", 2008).
inline float exact_fma(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  if (!std::isfinite(sum)) return (float)sum;
  const double part = sum - product, lost = (product - (sum - part)) + (c - part);  // Knuth's exact error of a sum
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (lost == 0 || bits & 1) return (float)sum;
  return (float)std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}
