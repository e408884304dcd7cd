#include "mt19937.hpp"

#include <algorithm>

#include "error.hpp"

namespace dso {
namespace {

constexpr int32_t kWords = 624, kMiddle = 397;

uint32_t twisted(uint32_t upper, uint32_t lower, uint32_t middle) {
  const uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
  return middle ^ (mixed >> 1) ^ (-(lower & 1u) & 0x9908b0dfu);
}

}  // namespace

Mt19937::Mt19937(const dso_mt19937& state) : s_(state) {
  if (s_.left < 1 || s_.left > kWords || s_.next < 0 || (s_.left > 1 && s_.next > kWords - s_.left + 1))
    fail(DSO_EINVAL, "generator: left is %d, next is %d, which is no state of a generator", s_.left, s_.next);
}

void Mt19937::twist() {
  uint32_t* const w = s_.state;
  for (int32_t i = 0; i < kWords - kMiddle; ++i) w[i] = twisted(w[i], w[i + 1], w[i + kMiddle]);
  for (int32_t i = kWords - kMiddle; i < kWords - 1; ++i) w[i] = twisted(w[i], w[i + 1], w[i + kMiddle - kWords]);
  w[kWords - 1] = twisted(w[kWords - 1], w[0], w[kMiddle - 1]);
  s_.left = kWords;
  s_.next = 0;
}

uint32_t Mt19937::output() {
  if (--s_.left == 0) twist();
  uint32_t y = s_.state[s_.next++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

void Mt19937::skip_to(int64_t number) {
  int64_t outputs = 2 * (number - drawn_);
  drawn_ = number;
  while (outputs > 0) {
    if (const int64_t held = std::min<int64_t>(outputs, s_.left - 1)) {
      s_.left -= int32_t(held);
      s_.next += int32_t(held);
      outputs -= held;
    } else {
      output();
      --outputs;
    }
  }
}

double Mt19937::uniform() {
  ++drawn_;
  const uint64_t upper = output(), number = upper << 32 | output();
  return double(number & ((uint64_t(1) << 53) - 1)) * 0x1p-53;
}

}  // namespace dso
