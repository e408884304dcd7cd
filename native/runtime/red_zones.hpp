// Bytes around a plan's buffers that must not be written: filled with a pattern, and checked after each stage in a checked
// context. Like AddressSanitizer, but for the optimized build and at the cost of a few cache lines per stage; for tests.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

namespace dso {

class RedZones {
 public:
  static constexpr int64_t kBytes = 64;
  static constexpr uint8_t kPattern = 0xc3;

  struct Found {
    int32_t zone = -1;  // the number it was added with; -1: all are intact
    int32_t byte = 0;   // offset in the zone of the first overwritten byte
  };

  void clear() { zones_.clear(); }
  void add(uint8_t* at, int32_t zone) {
    zones_.push_back({at, zone});
    std::memset(at, kPattern, kBytes);
  }
  Found look() const {
    for (const Zone& z : zones_)
      for (int32_t i = 0; i < kBytes; ++i)
        if (z.at[i] != kPattern) return {z.number, i};
    return {};
  }

 private:
  struct Zone {
    uint8_t* at;
    int32_t number;
  };
  std::vector<Zone> zones_;
};

}  // namespace dso
