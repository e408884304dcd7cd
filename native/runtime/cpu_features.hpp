// What this CPU and operating system can execute: cpuid reports the CPU's features, XCR0 which registers the system saves, and
// AMX also needs the kernel's permission for the process (see request_amx).
#pragma once
#include <cstdint>
#include <string>

namespace dso {

enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kBmi2 = 1u << 3,
  kAvxVnni = 1u << 4,
  kAvx512f = 1u << 5,
  kAvx512bw = 1u << 6,
  kAvx512dq = 1u << 7,
  kAvx512vl = 1u << 8,
  kAvx512Vnni = 1u << 9,
  kAvx512Bf16 = 1u << 10,
  kAmxTile = 1u << 11,
  kAmxInt8 = 1u << 12,
  kAmxBf16 = 1u << 13,
};

uint32_t detect_features();                    // a set of Feature
std::string feature_names(uint32_t features);  // "avx2, fma": with the names of /proc/cpuinfo
std::string describe_cpu();                    // JSON: vendor, model, features, caches in bytes, logical cores

// Requests the tile registers from Linux, permanently for the whole process. Returns an empty string, or the reason for
// refusal.
std::string request_amx();

}  // namespace dso
