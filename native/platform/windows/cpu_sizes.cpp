#include <windows.h>

#include <algorithm>
#include <vector>

#include "../cpu_features.hpp"

namespace dso {

CpuSizes cpu_sizes() {
  CpuSizes sizes = {0, 0, 0, int64_t(GetActiveProcessorCount(ALL_PROCESSOR_GROUPS))};
  DWORD bytes = 0;
  GetLogicalProcessorInformationEx(RelationCache, nullptr, &bytes);
  std::vector<uint8_t> entries(bytes);
  auto* const first = reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(entries.data());
  if (!bytes || !GetLogicalProcessorInformationEx(RelationCache, first, &bytes)) return sizes;
  for (DWORD at = 0; at < bytes;) {
    const auto& entry = *reinterpret_cast<const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(entries.data() + at);
    const CACHE_RELATIONSHIP& cache = entry.Cache;
    int64_t* const size = cache.Level == 1 && cache.Type == CacheData ? &sizes.l1d
                          : cache.Level == 2                          ? &sizes.l2
                          : cache.Level == 3                          ? &sizes.l3
                                                                      : nullptr;
    if (size) *size = std::max(*size, int64_t(cache.CacheSize));
    at += entry.Size;
  }
  return sizes;
}

// Windows has a request of its own (EnableProcessOptionalXStateFeatures), which no machine with AMX has tried yet.
bool system_has_tiles() { return false; }
std::string request_tiles() { return "the tile registers are used on Linux only"; }

}  // namespace dso
