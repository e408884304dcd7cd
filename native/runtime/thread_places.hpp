// Which CPU, and so which memory node, each thread of a team works for.
#pragma once
#include <cstdint>
#include <vector>

#include "topology.hpp"

namespace dso {

int32_t cores_of(const std::vector<Cpu>& cpus);
int32_t default_threads();  // min(cores of the CPUs that this process may use, cgroup limit)

// The CPUs in the order in which threads take them: one CPU of each core before second ones; fast cores before slow ones; then
// the memory nodes in turn, and of a node its L3 groups in turn. So any number of threads uses the bandwidth of all nodes and
// groups, and a core's second CPU only when every core has a thread.
std::vector<Cpu> in_order(std::vector<Cpu> cpus);

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The threads of a team, by memory node. On one node, or without a topology, they are not bound to anything.
struct ThreadPlaces {
  struct Node {
    int32_t node;               // the system's number
    int32_t first, threads;     // its threads are [first, first + threads)
    std::vector<int32_t> cpus;  // the system's numbers, of all CPUs of the node
  };
  std::vector<Node> nodes;  // ascending; one if all threads share a node
  bool real = true;         // whether the CPUs are this machine's, so that threads can be bound to them

  int32_t threads() const { return nodes.back().first + nodes.back().threads; }
  bool split() const { return nodes.size() > 1; }
  int32_t node_of(int thread) const;  // an index of `nodes`
  int nodes_count() const { return int(nodes.size()); }
  // What node `i` has of n parts: as many as its share of the threads, in multiples of `step`.
  Range of_node(int i, int64_t n, int64_t step = 1) const;
};

// `threads` of them, over these CPUs; no CPUs: one node.
ThreadPlaces place_threads(const std::vector<Cpu>& cpus, int32_t threads, bool real);

}  // namespace dso
