#include "../cpu_limits.hpp"
#include "../topology.hpp"

#include <sys/sysctl.h>

#include <algorithm>
#include <numeric>
#include <thread>

namespace dso {

int cgroup_cpus(const std::string&, const std::string&) { return 0; }  // there are none

// The performance cores: with a thread on an efficiency core, every stage would take as long as that core needs for its part.
std::vector<int32_t> allowed_cpus() {
  int cores = 0;
  size_t bytes = sizeof cores;
  if (sysctlbyname("hw.perflevel0.logicalcpu", &cores, &bytes, nullptr, 0) != 0)
    cores = int(std::thread::hardware_concurrency());
  std::vector<int32_t> out(size_t(std::max(1, cores)));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

int usable_cpus(int cpus) { return cpus; }

}  // namespace dso
