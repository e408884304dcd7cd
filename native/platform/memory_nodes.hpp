// Threads and pages of memory on machines with several memory nodes. A node is the system's number.
#pragma once
#include <cstdint>
#include <vector>

namespace dso {

struct PageCounts {  // pages of a range: on the node already; moved to it; elsewhere, because the system did not move them
  int64_t there = 0, moved = 0, stayed = 0;
};

// Pages that nobody has touched yet count as `stayed`, and so do those of a file that other processes have mapped too.
PageCounts move_pages_to(const uint8_t* begin, int64_t bytes, int32_t node);
int32_t node_of_page(const void* address);  // -1: not known, or the page has not been touched
// Gives the process pages of its own instead of those of a privately mapped file, on the node of the calling thread.
bool copy_pages(const uint8_t* begin, int64_t bytes);
// Spreads the pages of a range, touched and untouched, over the nodes in turn.
bool interleave_pages(const uint8_t* begin, int64_t bytes, const std::vector<int32_t>& nodes);

// The calling thread runs on these CPUs only, for as long as this lives. Does nothing if the system refuses.
class BoundThread {
 public:
  explicit BoundThread(const std::vector<int32_t>& cpus);  // none: not bound
  ~BoundThread();
  BoundThread(const BoundThread&) = delete;
  BoundThread& operator=(const BoundThread&) = delete;
  bool bound() const { return !before_.empty(); }

 private:
  std::vector<int32_t> before_;
};

}  // namespace dso
