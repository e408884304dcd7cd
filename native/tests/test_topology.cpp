// The machine's topology as the kernel describes it, and the CPUs that threads take.
#include <filesystem>
#include <fstream>

#include "check.hpp"
#include "thread_places.hpp"
#include "topology.hpp"

namespace {

class Tree {  // what Linux would show under /sys/devices
 public:
  Tree() { check(mkdtemp(root_) != nullptr, "mkdtemp"); }
  ~Tree() { std::filesystem::remove_all(root_); }
  Tree(const Tree&) = delete;
  void write(const std::string& path, const std::string& content) const {
    const std::filesystem::path whole = std::filesystem::path(root_) / path;
    std::filesystem::create_directories(whole.parent_path());
    std::ofstream(whole) << content << "\n";
  }
  std::string root() const { return root_; }

 private:
  char root_[32] = "/tmp/dso_topology_XXXXXX";
};

std::string of_cpu(int n, const char* file) { return "system/cpu/cpu" + std::to_string(n) + "/" + file; }

std::vector<int32_t> first(int n) {
  std::vector<int32_t> out;
  for (int i = 0; i < n; ++i) out.push_back(i);
  return out;
}

// Two nodes of two L3 groups of two cores of two CPUs, numbered as Linux does: second CPUs of the cores come last.
void server(const Tree& tree) {
  tree.write("system/node/online", "0-1");
  tree.write("system/node/node0/cpulist", "0-3,8-11");
  tree.write("system/node/node1/cpulist", "4-7,12-15");
  for (int n = 0; n < 16; ++n) {
    const int core = n % 8, group = core / 2;
    const auto pair = [](int a) { return std::to_string(a) + "," + std::to_string(a + 8); };
    tree.write(of_cpu(n, "topology/physical_package_id"), std::to_string(core / 4));
    tree.write(of_cpu(n, "topology/thread_siblings_list"), pair(core));
    tree.write(of_cpu(n, "cache/index2/level"), "2");
    tree.write(of_cpu(n, "cache/index2/shared_cpu_list"), pair(core));
    tree.write(of_cpu(n, "cache/index3/level"), "3");
    const std::string low = std::to_string(2 * group) + "-" + std::to_string(2 * group + 1);
    tree.write(of_cpu(n, "cache/index3/shared_cpu_list"), low + ",99");
  }
}

std::string numbers(const std::vector<Cpu>& cpus) {
  std::string out;
  for (const Cpu& c : cpus) out += (out.empty() ? "" : " ") + std::to_string(c.number);
  return out;
}

void reads_a_server() {
  const Tree tree;
  server(tree);
  const std::vector<Cpu> cpus = read_topology(first(16), tree.root());
  if (!check(cpus.size() == 16, "%zu CPUs", cpus.size())) return;
  for (int n = 0; n < 16; ++n) {
    const Cpu& c = cpus[(size_t)n];
    const int core = n % 8;
    check(c.number == n && c.core == core && c.l3 == core / 2 && c.node == core / 4 && c.package == core / 4 &&
              c.capacity == 1024,
          "CPU %d: core %d, l3 %d, node %d, package %d, capacity %d", n, c.core, c.l3, c.node, c.package, c.capacity);
  }
  check(cores_of(cpus) == 8, "%d cores", cores_of(cpus));
  const std::string order = numbers(in_order(cpus));
  check(order == "0 4 2 6 1 5 3 7 8 12 10 14 9 13 11 15", "the order is %s", order.c_str());
  const std::vector<Cpu> some = read_topology({1, 3, 9, 12}, tree.root());  // an affinity mask
  check(cores_of(some) == 3 && numbers(in_order(some)) == "1 12 3 9", "of some: %d cores, %s", cores_of(some),
        numbers(in_order(some)).c_str());
}

void fast_cores_first() {
  const Tree tree;
  tree.write("cpu_atom/cpus", "4-5");
  for (int n = 0; n < 4; ++n) tree.write(of_cpu(n, "topology/thread_siblings_list"), n < 2 ? "0-1" : "2-3");
  const std::vector<Cpu> hybrid = read_topology(first(6), tree.root());
  check(cores_of(hybrid) == 4 && numbers(in_order(hybrid)) == "0 2 4 5 1 3", "hybrid: %s", numbers(in_order(hybrid)).c_str());
  const Tree arm;
  for (int n = 0; n < 4; ++n) arm.write(of_cpu(n, "cpu_capacity"), n < 2 ? "446" : "1024");
  check(numbers(in_order(read_topology(first(4), arm.root()))) == "2 3 0 1", "big cores first");
}

void knows_nothing() {
  const Tree empty, damaged;
  for (const char* list : {"", "x", "3-", "5-2", "-1", "0-99999999999"}) {
    damaged.write("system/node/online", "0");
    damaged.write("system/node/node0/cpulist", list);
    damaged.write(of_cpu(0, "topology/thread_siblings_list"), list);
    const std::vector<Cpu> cpus = read_topology(first(3), damaged.root());
    check(cpus.size() == 3 && cpus[2].node == 0, "damaged list \"%s\"", list);
  }
  const std::vector<Cpu> cpus = read_topology({3, 5}, empty.root());
  check(cpus.size() == 2 && cores_of(cpus) == 2 && cpus[0].l3 == cpus[1].l3 && cpus[1].number == 5, "no description");
}

void places() {
  const Tree tree;
  server(tree);
  const std::vector<Cpu> cpus = read_topology(first(16), tree.root());
  const ThreadPlaces five = place_threads(cpus, 5, true);
  check(five.split() && five.threads() == 5 && five.nodes[0].threads == 3 && five.nodes[1].first == 3 &&
            five.nodes[1].cpus == std::vector<int32_t>({4, 5, 6, 7, 12, 13, 14, 15}),
        "5 threads: %d on node 0", five.nodes[0].threads);
  for (int t = 0; t < 5; ++t) check(five.node_of(t) == (t >= 3), "thread %d is on node %d", t, five.node_of(t));
  const ThreadPlaces one = place_threads(cpus, 1, true), none = place_threads({}, 7, true),
                     many = place_threads(cpus, 40, true);
  check(!one.split() && one.threads() == 1, "one thread needs one node");
  check(!none.split() && none.threads() == 7, "no topology");
  check(many.threads() == 40 && many.nodes[0].threads == 20, "more threads than CPUs: %d", many.nodes[0].threads);
}

void here() {
  const std::vector<int32_t> allowed = allowed_cpus();
  const int32_t n = dso_topology(nullptr, 0);
  check(n == (int32_t)allowed.size() && n >= 1, "%d CPUs, %zu allowed", n, allowed.size());
  std::vector<dso_cpu> cpus((size_t)n + 1, dso_cpu{-7, 0, 0, 0, 0, 0});
  check(dso_topology(cpus.data(), n) == n && cpus[0].number == allowed[0] && cpus[(size_t)n].number == -7, "dso_topology");
  check(dso_topology(nullptr, 1) == -DSO_EINVAL, "no place for it");
  check(dso_default_threads() >= 1 && dso_default_threads() <= dso_usable_cpus() && dso_usable_cpus() <= n,
        "%d threads, %d of %d", dso_default_threads(), dso_usable_cpus(), n);
}

}  // namespace

int main() {
  reads_a_server();
  fast_cores_first();
  knows_nothing();
  places();
  here();
  return report("test_topology");
}
