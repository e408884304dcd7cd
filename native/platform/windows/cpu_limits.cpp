#include "../cpu_limits.hpp"
#include "../topology.hpp"

#include <windows.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

namespace dso {
namespace {

// The processors of all groups that threads of this process run in: from Windows 11 and Server 2022 on all groups, before that
// the one in which it was started. An affinity mask exists only for a process in one group.
int affinity_cpus() {
  USHORT count = 0;
  GetProcessGroupAffinity(GetCurrentProcess(), &count, nullptr);
  std::vector<USHORT> groups(std::max<USHORT>(count, 1));
  count = USHORT(groups.size());
  if (!GetProcessGroupAffinity(GetCurrentProcess(), &count, groups.data())) return 0;
  if (count > 1) {
    int cpus = 0;
    for (USHORT i = 0; i < count; ++i) cpus += int(GetActiveProcessorCount(groups[i]));
    return cpus;
  }
  DWORD_PTR process = 0, system = 0;
  return GetProcessAffinityMask(GetCurrentProcess(), &process, &system) ? std::popcount(uint64_t(process)) : 0;
}

// A hard cap of the process's job (containers have one): hundredths of a percent of all processors. 0: none.
int job_cpus() {
  JOBOBJECT_CPU_RATE_CONTROL_INFORMATION rate = {};
  constexpr DWORD kHard = JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP;
  if (!QueryInformationJobObject(nullptr, JobObjectCpuRateControlInformation, &rate, sizeof rate, nullptr)) return 0;
  if ((rate.ControlFlags & kHard) != kHard || rate.CpuRate == 0) return 0;
  const int64_t all = GetActiveProcessorCount(ALL_PROCESSOR_GROUPS);
  return int((all * int64_t(rate.CpuRate) + 9999) / 10000);
}

}  // namespace

int cgroup_cpus(const std::string&, const std::string&) { return 0; }  // there are none

int usable_cpus(int cpus) {
  const int limit = job_cpus();
  return limit > 0 ? std::min(limit, cpus) : cpus;
}

std::vector<int32_t> allowed_cpus() {  // counted from 0: threads are not bound to them
  std::vector<int32_t> out(size_t(std::max(1, affinity_cpus())));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace dso
