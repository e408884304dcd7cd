// The number of CPUs that this process may use.
#pragma once
#include <string>

namespace dso {

// ceil(quota / period) for the smallest CPU quota among a process's cgroups (v2 and v1) and their parents; 0: no limit.
// `membership` is /proc/self/cgroup, `root` the mount point of the hierarchies.
int cgroup_cpus(const std::string& membership = "/proc/self/cgroup", const std::string& root = "/sys/fs/cgroup");

int usable_cpus(int cpus);  // of this many: min(cpus, cgroup limit)

}  // namespace dso
