// What this CPU and operating system can execute. x86: cpuid reports the CPU's features, XCR0 which registers the system saves,
// and AMX also needs the kernel's permission for the process. ARM: the system reports both in one (Linux: HWCAP).
#pragma once
#include <cstdint>
#include <span>
#include <string>

namespace dso {

enum Feature : uint32_t {  // of all processors, so that an error can name what one of them lacks
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
  kAsimd = 1u << 14,
  kDotProd = 1u << 15,
  kI8mm = 1u << 16,
  kArmBf16 = 1u << 17,
  kSve = 1u << 18,
  kSve2 = 1u << 19,
};

struct FeatureName {
  Feature feature;
  const char* name;  // as in /proc/cpuinfo
};

uint32_t detect_features();                    // a set of Feature
std::string feature_names(uint32_t features);  // "avx2, fma"
std::string describe_cpu();                    // JSON: vendor, model, features, caches in bytes, logical cores

// Requests what the system grants only on request and these features need, permanently for the whole process: AMX's tile
// registers. Returns an empty string, or the reason for refusal.
std::string request_permission(uint32_t features);

// ---- implemented per processor, for cpu_features.cpp
std::span<const FeatureName> known_features();
std::string cpu_vendor();
std::string cpu_model();

// ---- implemented per system
struct CpuSizes {
  int64_t l1d, l2, l3, cores;  // caches in bytes, 0: unknown; logical cores
};
CpuSizes cpu_sizes();
bool system_has_tiles();      // whether it saves AMX's tile registers, on request
std::string request_tiles();  // request_permission, for these

}  // namespace dso
