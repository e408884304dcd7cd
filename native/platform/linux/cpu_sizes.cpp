#include <unistd.h>

#include "../cpu_features.hpp"

namespace dso {

CpuSizes cpu_sizes() {
  return {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE),
          sysconf(_SC_NPROCESSORS_ONLN)};
}

}  // namespace dso
