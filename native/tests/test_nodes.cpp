// Several memory nodes: who runs which tasks, where pages of weights are put, and that the threads that read them are there.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "memory.hpp"
#include "plan_fixture.hpp"

namespace {

// Stages of tasks of which some belong to nodes. Every task runs once, and a node's on its threads.
class Owned final : public Job {
 public:
  explicit Owned(const ThreadPlaces& places) : places_(places) {}
  int64_t next() override {
    for (int i = 0; i < tasks_; ++i) wrong_ += ran_[i] != 1;
    if (stage_ == 400) return -1;
    ++stage_;
    ends_.clear();
    tasks_ = 0;
    for (int i = 0; i < places_.nodes_count(); ++i) ends_.push_back(tasks_ += (stage_ * (i + 3)) % 5);
    tasks_ += stage_ % 4;
    for (auto& r : ran_) r = 0;
    return tasks_;
  }
  int64_t node_end(int node) const override { return ends_[(size_t)node]; }
  void task(int64_t index, int thread) override {
    ++ran_[index];
    const size_t own = (size_t)places_.node_of(thread);
    if (index < ends_.back() && (index >= ends_[own] || (own > 0 && index < ends_[own - 1]))) ++wrong_;
  }
  long mistakes() const { return wrong_ + (stage_ != 400); }

 private:
  const ThreadPlaces places_;
  std::vector<int64_t> ends_;
  int stage_ = 0;
  int tasks_ = 0;
  std::atomic<int> ran_[32] = {};
  std::atomic<long> wrong_{0};
};

void tasks_stay_on_their_node() {
  for (int nodes : {2, 3, 4})
    for (int threads : {nodes, 5, 9}) {
      ThreadPool pool(on_nodes(threads, nodes));
      for (int run = 0; run < 3; ++run) {
        ThreadPool::Lease lease(pool);
        Owned job(pool.places());
        lease.team().run(job);
        check(job.mistakes() == 0, "%d threads on %d nodes: %ld mistakes", threads, nodes, job.mistakes());
      }
    }
}

// ---- the kernel that reads weights, with a record of who reads what

struct Read {
  std::thread::id thread;
  const uint8_t *begin, *end;
};
std::mutex reads_mutex;
std::vector<Read> all_reads;
decltype(Kernels::linear) real_linear;

void recorded_linear(const Matrix& w, const float* bias, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T,
                     bool prefill, int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch) {
  const int64_t bytes = (w.cols + 31) / 32 * dso_tile_bytes(w.format);
  {
    std::lock_guard lock(reads_mutex);
    all_reads.push_back({std::this_thread::get_id(), w.data + tile_begin * bytes, w.data + tile_end * bytes});
  }
  real_linear(w, bias, kind, x, x_stride, T, prefill, tile_begin, tile_end, y, y_stride, scratch);
}

// The node of each thread of a team: a stage that ends when all of them are in it.
std::map<std::thread::id, int> nodes_of(Context& context) {
  struct Meet final : Job {
    explicit Meet(const ThreadPlaces& places) : places(places) {}
    int64_t next() override { return std::exchange(opened, true) ? -1 : places.threads(); }
    void task(int64_t, int thread) override {
      {
        std::lock_guard lock(mutex);
        nodes[std::this_thread::get_id()] = places.node_of(thread);
      }
      for (++inside; inside < places.threads();) std::this_thread::yield();
    }
    const ThreadPlaces& places;
    bool opened = false;
    std::atomic<int> inside{0};
    std::mutex mutex;
    std::map<std::thread::id, int> nodes;
  } job(context.pool.places());
  ThreadPool::Lease lease(context.pool);
  lease.team().run(job);
  return job.nodes;
}

void check_reads(Context& context, const char* what) {
  const auto& memory = dynamic_cast<const RecordedMemory&>(*context.memory);
  const std::map<std::thread::id, int> nodes = nodes_of(context);
  const ThreadPlaces& places = context.pool.places();
  int64_t pages = 0;
  std::vector<int64_t> bytes(places.nodes.size());
  for (const Read& r : all_reads) {
    const int node = nodes.at(r.thread);
    bytes[(size_t)node] += r.end - r.begin;
    const auto page = (uintptr_t)page_bytes();
    for (uintptr_t at = ((uintptr_t)r.begin + page - 1) / page * page; at + page <= (uintptr_t)r.end; at += page, ++pages) {
      const int32_t lies = memory.node_of((const void*)at);
      check(lies == places.nodes[(size_t)node].node, "%s: a thread of node %d reads a page on node %d", what, node, lies);
    }
  }
  const auto [least, most] = std::minmax_element(bytes.begin(), bytes.end());
  check(pages > 50 && *least * 3 > *most * 2, "%s: %lld pages; %lld to %lld bytes a node", what, (long long)pages,
        (long long)*least, (long long)*most);
}

void threads_read_their_own_node() {
  static Kernels recording = *variants().back().kernels;
  real_linear = recording.linear;
  recording.linear = recorded_linear;
  Spec spec;
  spec.hidden = 512, spec.inner = 768, spec.vocab = 1000, spec.heads = 8, spec.kv_heads = 4, spec.head_dim = 64;
  spec.format = DSO_INT8;
  spec.activation = DSO_SLOT_Q16;
  const auto feed = [](Model& model) {
    Random random(7);
    Feeder feeder(model, 8, random);
    Sequence s;
    for (int i = 0; i < 80; ++i) s.tokens.push_back(random.below(model.spec.vocab));
    feeder.feed({{&s, 70, DSO_PHASE_PREFILL}});
    while (s.done < 80) feeder.feed({{&s, 1, DSO_PHASE_DECODE}});
    return s.logits;
  };
  Model alone(spec, recording, 3);
  const auto want = feed(alone);
  for (int nodes : {2, 3, 4}) {
    Model model(spec, recording, on_nodes(8, nodes));
    all_reads.clear();
    check(feed(model) == want, "%d nodes: other logits", nodes);
    check_reads(*model.context.c->shared, "a plan");
    dso_run_counts counts{};
    check(dso_plan_counts(model.plan, &counts) == 0 && counts.pages_there + counts.pages_moved > 100 && counts.pages_left == 0,
          "%lld pages there, %lld moved, %lld left", (long long)counts.pages_there, (long long)counts.pages_moved,
          (long long)counts.pages_left);
  }
}

// ---- the system's own pages, on as many nodes as there are here

void real_pages() {
  const int64_t page = page_bytes(), bytes = 3000 * page;
  auto* memory = static_cast<uint8_t*>(map_memory(bytes));
  if (!check(memory != nullptr, "no memory")) return;
  const int32_t node = read_topology(allowed_cpus())[0].node;
  check(node_of_page(memory) == -1, "an untouched page is on node %d", node_of_page(memory));
  PageCounts counts = move_pages_to(memory, bytes, node);
  if (counts.stayed == 3000) {
    for (int64_t at = 0; at < bytes; at += page) memory[at] = 1;
    counts = move_pages_to(memory, bytes, node);
  }
  const bool refused = counts.stayed == 3000;  // by a container, or a system without memory nodes
  if (refused) printf("the system does not say where pages are: real pages are not checked\n");
  check(refused || (counts.there + counts.moved == 3000 && node_of_page(memory) == node), "%lld there, %lld moved, %lld left",
        (long long)counts.there, (long long)counts.moved, (long long)counts.stayed);
  counts = move_pages_to(memory, bytes, 1000);  // there is no such node
  check(counts.stayed == 3000, "%lld pages left a node for none", (long long)(3000 - counts.stayed));
  check(!interleave_pages(memory, bytes, {1000}) && !interleave_pages(memory, bytes, {-1}), "interleaved over no node");
  check(refused || interleave_pages(memory, bytes, {node}), "not interleaved over node %d", node);
  unmap_memory(memory, bytes);
}

void copies_of_files() {
  char name[] = "/tmp/dso_nodes_XXXXXX";
  const int fd = mkstemp(name);
  const int64_t page = page_bytes();
  const std::vector<uint8_t> content((size_t)(4 * page), 7);
  if (!check(fd >= 0 && write(fd, content.data(), content.size()) == (ssize_t)content.size(), "no file")) return;
  void* const mapped = mmap(nullptr, content.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
  auto* const bytes = static_cast<uint8_t*>(mapped);
  if (madvise(mapped, (size_t)page, 0x7fffffff) == 0) {
    printf("an emulator ignores advice on memory: copies of files are not checked\n");
  } else if (copy_pages(bytes, 2 * page)) {  // since Linux 5.14
    const uint8_t eight = 8;
    check(pwrite(fd, &eight, 1, 0) == 1 && pwrite(fd, &eight, 1, 2 * page) == 1, "not written");
    check(bytes[0] == 7 && bytes[2 * page] == 8, "the first page is %d, must be a copy; the third %d, must be the file's",
          bytes[0], bytes[2 * page]);
  }
  munmap(mapped, content.size());
  close(fd);
  unlink(name);
}

void bound_threads() {
  const std::vector<int32_t> before = allowed_cpus();
  {
    BoundThread bound({before.back()});
    check(bound.bound() && allowed_cpus() == std::vector<int32_t>{before.back()}, "not bound");
    BoundThread absent({1 << 15}), none({});
    check(!absent.bound() && !none.bound() && allowed_cpus().size() == 1, "bound to a CPU that does not exist");
  }
  check(allowed_cpus() == before, "the thread is still bound");
}

void contexts() {
  std::vector<dso_cpu> cpus;
  for (int i = 0; i < 12; ++i) cpus.push_back({i, i / 2, i / 4, i / 4, 0, 1024});
  int32_t threads[4] = {};
  dso_context* c = nullptr;
  check(dso_context_create_on(nullptr, 0, cpus.data(), 12, DSO_NODES_MOVE, &c) == 0, "%s", dso_last_error());
  check(dso_context_threads(c) == 6 && dso_context_nodes(c, threads, 4) == 3 && threads[2] == 2, "6 cores on 3 nodes: %d, %d",
        dso_context_threads(c), dso_context_nodes(c, nullptr, 0));
  dso_context_destroy(c);
  check(dso_context_create_on(nullptr, 5, cpus.data(), 12, DSO_NODES_OFF, &c) == 0 && dso_context_nodes(c, threads, 1) == 1 &&
            threads[0] == 5,
        "nodes off");
  dso_context_destroy(c);
  refuses(dso_context_create_on(nullptr, 0, cpus.data(), 0, DSO_NODES_MOVE, &c), DSO_EINVAL, "n_cpus is 0", "no CPUs");
  refuses(dso_context_create_on(nullptr, 0, cpus.data(), 12, 3, &c), DSO_EINVAL, "nodes is 3", "an unknown mode");
  cpus[4].node = -1;
  refuses(dso_context_create_on(nullptr, 0, cpus.data(), 12, 1, &c), DSO_EINVAL, "CPU 4: node is -1", "an invalid node");
}

}  // namespace

int main() {
  tasks_stay_on_their_node();
  threads_read_their_own_node();
  real_pages();
  copies_of_files();
  bound_threads();
  contexts();
  return report("test_nodes");
}
