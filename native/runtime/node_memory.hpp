// Where the pages of weights and caches lie on a machine with several memory nodes.
//
// The threads of a node compute fixed rows of each matrix (ThreadPlaces::of_node), so the pages that have these rows belong on
// it: a plan's first run touches them there and moves those that lie elsewhere. Pages of a mapped file are the system's own
// copy of the file, which other processes may use too. They are moved as well if no other process has mapped them, or copied
// on request, which costs the memory of the weights once more.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "memory_nodes.hpp"
#include "thread_pool.hpp"

namespace dso {

// What places pages: the system, or a record of what it would be asked, for topologies that are not this machine's.
class NodeMemory {
 public:
  virtual ~NodeMemory() = default;
  // Called on a thread of the node.
  virtual PageCounts move(const uint8_t* begin, int64_t bytes, int32_t node) = 0;
  virtual bool copy(const uint8_t* begin, int64_t bytes, int32_t node) = 0;
  virtual bool interleave(const uint8_t* begin, int64_t bytes, const std::vector<int32_t>& nodes) = 0;
};

class SystemMemory final : public NodeMemory {
 public:
  PageCounts move(const uint8_t* begin, int64_t bytes, int32_t node) override { return move_pages_to(begin, bytes, node); }
  bool copy(const uint8_t* begin, int64_t bytes, int32_t) override { return copy_pages(begin, bytes); }
  bool interleave(const uint8_t* begin, int64_t bytes, const std::vector<int32_t>& nodes) override {
    return interleave_pages(begin, bytes, nodes);
  }
};

class RecordedMemory final : public NodeMemory {
 public:
  PageCounts move(const uint8_t* begin, int64_t bytes, int32_t node) override;
  bool copy(const uint8_t* begin, int64_t bytes, int32_t node) override;
  bool interleave(const uint8_t*, int64_t, const std::vector<int32_t>&) override { return true; }
  int32_t node_of(const void* address) const;  // of its page; -1: never asked for

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, int32_t> nodes_;  // by page
};

struct NodeRange {  // weights of a node, by its index
  const uint8_t* begin;
  int64_t bytes;
  int node;
};

struct Placement {
  PageCounts pages;    // of weights
  int64_t copied = 0;  // pages of mapped files, in addition
};

// Places the pages of these ranges on the team's threads. A page with rows of two nodes belongs to the first. copies: pages of
// mapped files are copied instead of moved.
Placement place_pages(Team& team, const ThreadPlaces& places, NodeMemory& memory, std::vector<NodeRange> ranges, bool copies);

}  // namespace dso
