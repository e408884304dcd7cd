// The CPUs that this process may use, and which of them share a core, a cache or memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dso.h"

namespace dso {

using Cpu = dso_cpu;

std::vector<int32_t> allowed_cpus();  // the system's numbers, ascending; at least one

// Of these CPUs, in their order. What the system does not report is assumed to be equal for all of them; cores it does not
// report have one CPU each. `root` (Linux): where the kernel describes its devices.
std::vector<Cpu> read_topology(const std::vector<int32_t>& cpus, const std::string& root = "/sys/devices");

}  // namespace dso
