// Costs of the runtime itself: a stage, the start of a run, a whole decode step, and the throughput while another process
// occupies a core.
//   bench_runtime [threads]           (default: as many as this process may use)
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "isa.hpp"
#include "plan_fixture.hpp"

namespace {

double seconds(auto&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
double best(int times, auto&& body) {
  double s = 1e9;
  for (int i = 0; i < times; ++i) s = std::min(s, seconds(body));
  return s;
}

class Busy {  // a process that uses all available time of the last CPU
 public:
  Busy() : child_(fork()) {
    if (child_ == 0) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &set);
      sched_setaffinity(0, sizeof set, &set);
      for (volatile uint64_t n = 0;;) n = n + 1;
    }
  }
  ~Busy() {
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }

 private:
  const pid_t child_;
};

struct Empty final : Job {  // one task per thread
  int64_t stages, tasks;
  Empty(int64_t stages, int64_t tasks) : stages(stages), tasks(tasks) {}
  int64_t next() override { return stages-- > 0 ? tasks : -1; }
  void task(int64_t, int) override {}
};

void pool(int threads) {
  ThreadPool pool(threads);
  ThreadPool::Lease lease(pool);
  Team& team = lease.team();
  auto run = [&](int64_t stages) {
    Empty job(stages, threads);
    team.run(job);
  };
  constexpr int stages = 20000;
  printf("stage, %d threads          %8.3f us\n", threads, best(10, [&] { run(stages); }) / stages * 1e6);
  double asleep = 1e9;
  for (int i = 0; i < 50; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    asleep = std::min(asleep, seconds([&] { run(1); }));
  }
  printf("run of one stage, asleep  %8.3f us\n", asleep * 1e6);
}

void decode(int threads, int32_t format, int32_t activation, const char* name, bool busy) {
  Spec spec;  // SmolLM2-135M
  spec.hidden = 576, spec.heads = 9, spec.kv_heads = 3, spec.head_dim = spec.rot = 64, spec.inner = 1536, spec.vocab = 49152,
  spec.layers = 30;
  spec.format = format, spec.activation = activation, spec.kv_type = DSO_KV_BF16;
  Random random(1);
  Model model(spec, choose_kernels(nullptr), threads);
  Feeder feeder(model, 64, random);
  double bytes = 0;
  for (const dso_weight& w : model.weights) bytes += (double)w.bytes;
  bytes -= (double)model.weights[0].bytes;  // the embedding: one row of it
  Sequence s{std::vector<int32_t>(1024, 5), 0, {}, {}};
  const double prompt = seconds([&] { feeder.feed({{&s, 512, DSO_PHASE_PREFILL}}); });
  s.logits.clear();
  auto tokens = [&](int n) {
    double fastest = 1e9, all = 0;
    for (int i = 0; i < n; ++i) {
      const double t = seconds([&] { feeder.feed({{&s, 1, DSO_PHASE_DECODE}}); });
      fastest = std::min(fastest, t);
      all += t;
    }
    printf("%-5s decode at %d tokens: best %.3f ms (%.1f GB/s), mean %.3f ms\n", name, s.done, fastest * 1e3,
           bytes / fastest / 1e9, all / n * 1e3);
    return all / n;
  };
  printf("%-5s prefill of 512 (first run): %.0f tokens/s\n", name, 512 / prompt);
  const double alone = tokens(100);
  dso_plan_set_timing(model.plan, 1);
  tokens(50);
  std::vector<double> by_step(model.steps.size());
  int64_t runs;
  dso_plan_timing(model.plan, by_step.data(), &runs);
  dso_plan_set_timing(model.plan, 0);
  std::map<int32_t, double> by_op;
  for (size_t i = 0; i < by_step.size(); ++i) by_op[model.steps[i].op] += by_step[i] / (double)runs;
  for (auto [op, t] : by_op) printf("   op %2d  %8.3f ms\n", op, t * 1e3);
  if (!busy) return;
  Busy other;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  printf("with a busy process on one core: throughput x %.2f\n", alone / tokens(200));
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : dso_default_threads();
  pool(threads);
  decode(threads, DSO_INT4, DSO_SLOT_Q8, "int4", true);
  decode(threads, DSO_INT8, DSO_SLOT_Q16, "int8", false);
  return 0;
}
