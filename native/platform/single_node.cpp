// macOS has one memory node, and Windows is treated as if it had one: nothing is bound or moved.
#include "memory_nodes.hpp"
#include "topology.hpp"

namespace dso {

std::vector<Cpu> read_topology(const std::vector<int32_t>& cpus, const std::string&) {
  std::vector<Cpu> out;
  for (const int32_t n : cpus) {
    Cpu cpu{};
    cpu.number = n;
    cpu.core = int32_t(out.size());
    cpu.capacity = 1024;  // all equal
    out.push_back(cpu);
  }
  return out;
}

PageCounts move_pages_to(const uint8_t*, int64_t, int32_t) { return {}; }
int32_t node_of_page(const void*) { return -1; }
bool copy_pages(const uint8_t*, int64_t) { return false; }
bool interleave_pages(const uint8_t*, int64_t, const std::vector<int32_t>&) { return false; }

BoundThread::BoundThread(const std::vector<int32_t>&) {}
BoundThread::~BoundThread() {}

}  // namespace dso
