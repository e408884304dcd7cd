#include "thread_places.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "cpu_limits.hpp"

namespace dso {

int32_t cores_of(const std::vector<Cpu>& cpus) {
  std::set<int32_t> cores;
  for (const Cpu& c : cpus) cores.insert(c.core);
  return int32_t(cores.size());
}

int32_t default_threads() { return usable_cpus(cores_of(read_topology(allowed_cpus()))); }

std::vector<Cpu> in_order(std::vector<Cpu> cpus) {
  // (sibling, -capacity, turn of its group, turn of its node, node): a group's turn counts its earlier CPUs of the same rank,
  // and a node's turn those of all its groups.
  using Rank = std::tuple<int32_t, int32_t>;
  using Key = std::tuple<int32_t, int32_t, int32_t, int32_t>;
  std::sort(cpus.begin(), cpus.end(), [](const Cpu& a, const Cpu& b) { return a.number < b.number; });
  std::map<int32_t, int32_t> siblings;
  std::map<std::tuple<Rank, int32_t>, int32_t> in_group, in_node;
  std::vector<std::tuple<int32_t, int32_t, int32_t, int32_t, size_t>> by_group;  // sibling, -capacity, turn, group, index
  for (size_t i = 0; i < cpus.size(); ++i) {
    const Rank rank{siblings[cpus[i].core]++, -cpus[i].capacity};
    by_group.emplace_back(std::get<0>(rank), std::get<1>(rank), in_group[{rank, cpus[i].l3}]++, cpus[i].l3, i);
  }
  std::sort(by_group.begin(), by_group.end());
  std::vector<std::pair<Key, size_t>> keys;
  for (const auto& [sibling, slowness, turn, group, i] : by_group) {
    const int32_t node = cpus[i].node;
    keys.push_back({{sibling, slowness, in_node[{Rank{sibling, slowness}, node}]++, node}, i});
  }
  std::sort(keys.begin(), keys.end());
  std::vector<Cpu> out;
  for (const auto& key : keys) out.push_back(cpus[key.second]);
  return out;
}

int32_t ThreadPlaces::node_of(int thread) const {
  int32_t i = int32_t(nodes.size()) - 1;
  while (nodes[i].first > thread) --i;
  return i;
}

Range ThreadPlaces::of_node(int i, int64_t n, int64_t step) const {
  const auto first = [&](size_t k) { return k == nodes.size() ? n : n * nodes[k].first / threads() / step * step; };
  return {first(size_t(i)), first(size_t(i) + 1)};
}

ThreadPlaces place_threads(const std::vector<Cpu>& cpus, int32_t threads, bool real) {
  ThreadPlaces out;
  out.real = real;
  std::map<int32_t, int32_t> count;
  const std::vector<Cpu> order = in_order(cpus);
  for (int32_t t = 0; t < threads && !order.empty(); ++t) ++count[order[size_t(t) % order.size()].node];
  if (count.empty()) count[0] = threads;
  int32_t first = 0;
  for (const auto& [node, n] : count) {
    out.nodes.push_back({node, first, n, {}});
    for (const Cpu& c : cpus)
      if (c.node == node) out.nodes.back().cpus.push_back(c.number);
    first += n;
  }
  return out;
}

}  // namespace dso
