#include "../topology.hpp"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <thread>

namespace dso {
namespace {

// "0-3,8,10-11". Empty if the file cannot be read.
std::vector<int32_t> read_list(const std::string& path) {
  std::vector<int32_t> out;
  std::ifstream file(path);
  for (int32_t first, last; file >> first; file.get()) {
    last = first;
    if (file.peek() == '-' && !(file.get(), file >> last)) break;
    if (first < 0 || last < first || last > (1 << 20)) break;
    for (int32_t i = first; i <= last; ++i) out.push_back(i);
    if (file.peek() != ',') break;
  }
  return out;
}

int32_t read_number(const std::string& path, int32_t absent) {
  std::ifstream file(path);
  int32_t n;
  return file >> n ? n : absent;
}

bool has(const std::vector<int32_t>& list, int32_t n) { return std::find(list.begin(), list.end(), n) != list.end(); }

// Numbers from 0 on for the groups in which CPUs are found, in the order of their first CPU.
class Numbers {
 public:
  int32_t of(int32_t group) { return known_.emplace(group, int32_t(known_.size())).first->second; }

 private:
  std::map<int32_t, int32_t> known_;
};

// The first CPU that shares the last cache with this one; -1: not reported.
int32_t first_of_l3(const std::string& folder) {
  for (int i = 0; i < 8; ++i) {
    const std::string cache = folder + "/cache/index" + std::to_string(i);
    if (read_number(cache + "/level", 0) != 3) continue;
    const std::vector<int32_t> shared = read_list(cache + "/shared_cpu_list");
    if (!shared.empty()) return shared.front();
  }
  return -1;
}

constexpr int32_t kFull = 1024;  // capacity of the fastest core, as in Linux's cpu_capacity

}  // namespace

std::vector<int32_t> allowed_cpus() {
  std::vector<int32_t> out;
  for (int n = 1024; n <= 1 << 18 && out.empty(); n *= 4) {  // a mask too small for this kernel fails: try a larger one
    std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(n), [](cpu_set_t* s) { CPU_FREE(s); });
    const size_t bytes = CPU_ALLOC_SIZE(n);
    if (!set || sched_getaffinity(0, bytes, set.get()) != 0) continue;
    for (int i = 0; i < n; ++i)
      if (CPU_ISSET_S(i, bytes, set.get())) out.push_back(i);
  }
  for (int32_t i = 0; out.empty() || (i < int32_t(std::thread::hardware_concurrency()) && out.back() < i); ++i)
    out.push_back(i);  // an unknown mask: all of them
  return out;
}

std::vector<Cpu> read_topology(const std::vector<int32_t>& cpus, const std::string& root) {
  std::map<int32_t, int32_t> node_of;
  for (const int32_t node : read_list(root + "/system/node/online"))
    for (const int32_t cpu : read_list(root + "/system/node/node" + std::to_string(node) + "/cpulist")) node_of[cpu] = node;
  const std::vector<int32_t> slow = read_list(root + "/cpu_atom/cpus");  // of hybrid x86 processors
  Numbers cores, groups;
  std::vector<Cpu> out;
  for (const int32_t n : cpus) {
    const std::string folder = root + "/system/cpu/cpu" + std::to_string(n);
    const std::vector<int32_t> siblings = read_list(folder + "/topology/thread_siblings_list");
    const auto node = node_of.find(n);
    Cpu cpu{};
    cpu.number = n;
    cpu.core = cores.of(siblings.empty() ? n : siblings.front());
    cpu.package = std::max(0, read_number(folder + "/topology/physical_package_id", 0));
    cpu.node = node == node_of.end() ? 0 : node->second;
    const int32_t l3 = first_of_l3(folder);
    cpu.l3 = groups.of(l3 >= 0 ? l3 : -1 - cpu.node);
    cpu.capacity = read_number(folder + "/cpu_capacity", has(slow, n) ? kFull / 2 : kFull);
    out.push_back(cpu);
  }
  return out;
}

}  // namespace dso
