// Bytes beside a plan's buffers that nothing may write: filled with a pattern, and looked at after each stage of a checked
// context. What AddressSanitizer does of the optimised build, at the price of a few cache lines a stage; for tests.
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
    int32_t zone = -1;  // the number it was added with; -1: all are whole
    int32_t byte = 0;   // of the zone, the first that was written
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
