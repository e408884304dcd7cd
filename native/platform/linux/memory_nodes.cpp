#include "../memory_nodes.hpp"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "../memory.hpp"
#include "../topology.hpp"

namespace dso {
namespace {

// From linux/mempolicy.h and asm-generic/mman-common.h, which older kernel headers lack in part. Called by number: the
// functions are in libnuma, which need not be installed.
constexpr int kInterleave = 3, kMove = 1 << 1, kPopulateWrite = 23;
constexpr int64_t kBatch = 1024;  // pages of a call

long move_pages(unsigned long count, void** pages, const int* nodes, int* status) {
  return syscall(SYS_move_pages, 0, count, pages, nodes, status, kMove);
}

bool run_on(const std::vector<int32_t>& cpus) {
  const int32_t last = *std::max_element(cpus.begin(), cpus.end());
  std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(last + 1), [](cpu_set_t* s) { CPU_FREE(s); });
  const size_t bytes = CPU_ALLOC_SIZE(last + 1);
  if (!set) return false;
  CPU_ZERO_S(bytes, set.get());
  for (const int32_t cpu : cpus) CPU_SET_S(cpu, bytes, set.get());
  return sched_setaffinity(0, bytes, set.get()) == 0;
}

}  // namespace

PageCounts move_pages_to(const uint8_t* begin, int64_t bytes, int32_t node) {
  PageCounts counts;
  const int64_t page = page_bytes(), total = bytes / page;
  std::vector<void*> pages, moving;
  std::vector<int> status, nodes;
  for (int64_t at = 0; at < total; at += kBatch) {
    const int64_t n = std::min(kBatch, total - at);
    pages.clear();
    for (int64_t i = 0; i < n; ++i) pages.push_back(const_cast<uint8_t*>(begin + (at + i) * page));
    status.assign(size_t(n), -1);
    if (move_pages((unsigned long)n, pages.data(), nullptr, status.data()) != 0) {
      counts.stayed += n;
      continue;
    }
    moving.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (status[size_t(i)] == node)
        ++counts.there;
      else if (status[size_t(i)] < 0)
        ++counts.stayed;
      else
        moving.push_back(pages[size_t(i)]);
    }
    if (moving.empty()) continue;
    nodes.assign(moving.size(), node);
    status.assign(moving.size(), -1);
    move_pages(moving.size(), moving.data(), nodes.data(), status.data());  // may move only some, whatever it returns
    for (const int s : status) ++(s == node ? counts.moved : counts.stayed);
  }
  return counts;
}

int32_t node_of_page(const void* address) {
  void* page = const_cast<void*>(address);
  int status = -1;  // move_pages only asks here: get_mempolicy would touch the page
  return move_pages(1, &page, nullptr, &status) == 0 ? std::max(-1, status) : -1;
}

bool copy_pages(const uint8_t* begin, int64_t bytes) {
  return madvise(const_cast<uint8_t*>(begin), size_t(bytes), kPopulateWrite) == 0;
}

bool interleave_pages(const uint8_t* begin, int64_t bytes, const std::vector<int32_t>& nodes) {
  std::vector<unsigned long> mask;
  constexpr int32_t kBits = 8 * sizeof(unsigned long);
  for (const int32_t node : nodes) {
    if (node < 0 || node > (1 << 16)) return false;
    mask.resize(std::max(mask.size(), size_t(node / kBits + 1)));
    mask[size_t(node / kBits)] |= 1ul << node % kBits;
  }
  return syscall(SYS_mbind, begin, (unsigned long)bytes, kInterleave, mask.data(), (unsigned long)(mask.size() * kBits + 1),
                 kMove) == 0;
}

BoundThread::BoundThread(const std::vector<int32_t>& cpus) {
  if (cpus.empty()) return;
  std::vector<int32_t> before = allowed_cpus();
  if (run_on(cpus)) before_ = std::move(before);
}
BoundThread::~BoundThread() {
  if (!before_.empty()) run_on(before_);
}

}  // namespace dso
