#include "../cpu_limits.hpp"

#include <algorithm>
#include <fstream>

namespace dso {
namespace {

int cpus(long long quota, long long period) {
  return quota > 0 && period > 0 ? int(std::min<long long>((quota + period - 1) / period, 1 << 20)) : 0;
}

int v2_limit(const std::string& folder) {  // cpu.max: "max 100000" or "150000 100000"
  std::ifstream file(folder + "/cpu.max");
  long long quota = 0, period = 0;
  return file >> quota >> period ? cpus(quota, period) : 0;
}

int v1_limit(const std::string& folder) {
  std::ifstream a(folder + "/cpu.cfs_quota_us"), b(folder + "/cpu.cfs_period_us");
  long long quota = 0, period = 0;
  return a >> quota && b >> period ? cpus(quota, period) : 0;
}

void tighten(int& limit, int found) {
  if (found > 0) limit = limit > 0 ? std::min(limit, found) : found;
}

}  // namespace

int cgroup_cpus(const std::string& membership, const std::string& root) {
  int limit = 0;
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // "id:controllers:path"; v2 is "0::path"
    const size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",cpu,") == std::string::npos) continue;
    // In a container the path may be the host's; walking up to the mounted root still finds the limit.
    for (std::string path = line.substr(b + 1);; path.erase(path.rfind('/'))) {
      if (path == "/") path.clear();
      if (v2) {
        tighten(limit, v2_limit(root + path));
        tighten(limit, v2_limit(root + "/unified" + path));
      } else {
        tighten(limit, v1_limit(root + "/cpu" + path));
        tighten(limit, v1_limit(root + "/cpu,cpuacct" + path));
      }
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return limit;
}

int usable_cpus(int cpus) {
  const int limit = cgroup_cpus();
  return limit > 0 ? std::min(limit, cpus) : cpus;
}

}  // namespace dso
