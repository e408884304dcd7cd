#include "../cpu_limits.hpp"

#include <sys/sysctl.h>

#include <algorithm>
#include <thread>

namespace dso {

int cgroup_cpus(const std::string&, const std::string&) { return 0; }  // there are none

// The performance cores: with a thread on an efficiency core, every stage would take as long as that core needs for its part.
int default_threads() {
  int cores = 0;
  size_t bytes = sizeof cores;
  if (sysctlbyname("hw.perflevel0.logicalcpu", &cores, &bytes, nullptr, 0) != 0)
    cores = int(std::thread::hardware_concurrency());
  return std::max(1, cores);
}

}  // namespace dso
