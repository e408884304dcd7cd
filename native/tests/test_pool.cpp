// The thread pool: every task once, stage after stage; several pools, callers and forks; and the number of CPUs that a process
// may use.
#ifndef _WIN32
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <new>
#include <thread>

#include "check.hpp"
#include "cpu_limits.hpp"
#include "error.hpp"
#include "processor.hpp"
#include "thread_pool.hpp"

namespace {
thread_local long allocations_left = -1;  // this thread's; -1: any number
}

__attribute__((noinline)) void* operator new(size_t bytes) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* p = malloc(bytes)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { free(p); }

namespace {

// Stages of a few tasks, sometimes none. When each opens, every task of the previous one must have run exactly once, and none
// may be running.
class Checked final : public Job {
 public:
  Checked(int threads, int stages, void (*pause)(int64_t stage, int thread) = nullptr)
      : threads_(threads), stages_(stages), pause_(pause) {}
  int64_t next() override {
    if (running_ != 0) ++wrong_;
    for (int i = 0; i < tasks_; ++i)
      if (ran_[i] != 1) ++wrong_;
    if (stage_ == stages_) return -1;
    ++stage_;
    tasks_ = (stage_ * 7 + stage_ / 5) % most;
    for (auto& r : ran_) r = 0;
    return tasks_;
  }
  void task(int64_t index, int thread) override {
    ++running_;
    if (index < 0 || index >= tasks_ || thread < 0 || thread >= threads_)
      ++wrong_;
    else
      ++ran_[index];
    if (pause_) pause_(stage_, thread);
    --running_;
  }
  long mistakes() const { return wrong_ + (stage_ != stages_); }

 private:
  static constexpr int most = 9;
  const int threads_, stages_;
  void (*const pause_)(int64_t, int);
  long stage_ = 0;
  int tasks_ = 0;
  std::atomic<int> ran_[most] = {}, running_{0};
  std::atomic<long> wrong_{0};
};

long mistakes_of(Team& team, int stages) {
  Checked job(team.threads(), stages);
  team.run(job);
  return job.mistakes();
}

void stages() {
  for (int n : {1, 2, 3, 5}) {
    ThreadPool pool(n);
    for (int run = 0; run < 3; ++run) {
      ThreadPool::Lease lease(pool);
      const long wrong = mistakes_of(lease.team(), n > 2 ? 500 : 20000);  // more threads than cores: mostly sleeps and wake-ups
      check(wrong == 0, "%d threads: %ld mistakes", n, wrong);
      check(mistakes_of(lease.team(), 0) == 0, "%d threads: an empty job", n);
    }
  }
}

// Data written by tasks and read by the next stage and the caller: plain variables, so that ThreadSanitizer detects a missing
// order.
void results_are_seen() {
  struct Count final : Job {
    int stage = 0;
    long count[2] = {}, wrong = 0;
    int64_t next() override {
      wrong += count[0] != stage || count[1] != stage;
      return stage == 3 ? -1 : (++stage, 2);
    }
    void task(int64_t i, int) override {
      ++count[i];
      for (int k = 0; k < 20; ++k) relax();
    }
  };
  ThreadPool pool(2);
  for (int run = 0; run < rounds(20000); ++run) {
    ThreadPool::Lease lease(pool);
    Count job;
    lease.team().run(job);
    if (!check(job.wrong == 0 && job.count[0] == 3 && job.count[1] == 3, "run %d: results of a task are missing", run)) return;
  }
}

// All threads compute with the same settings, whatever the caller's thread has, and the caller's settings are preserved.
void floats() {
  struct Tiny final : Job {
    int64_t left = 50;
    std::atomic<int> flushed{0};
    int64_t next() override { return left-- > 0 ? 2 : -1; }
    void task(int64_t, int) override {
      volatile float x = 1e-38f;
      x = x * 0.01f;
      flushed += x == 0;
      for (int k = 0; k < 200; ++k) relax();  // so that both take some
    }
  };
  using Bits = FloatSettings::Bits;
  const Bits before = FloatSettings::get(), flushing = FloatSettings::kFlushing;
  ThreadPool pool(2);
  for (const Bits setting : {flushing, before, flushing}) {  // the first is what the workers inherit
    FloatSettings::set(setting);
    Tiny job;
    {
      ThreadPool::Lease lease(pool);
      lease.team().run(job);
    }
    const Bits after = FloatSettings::get() & flushing;
    FloatSettings::set(before);
    check(job.flushed == 0, "%d denormals became zero", job.flushed.load());
    check(after == (setting & flushing), "the caller's setting was %llx, is %llx", (unsigned long long)setting,
          (unsigned long long)after);
  }
}

// Memory runs out while the team is created: an error at any allocation, and no thread is left behind.
void no_memory() {
  ThreadPool pool(4);
  for (int after = 0; after < 8; ++after) {
    try {
      allocations_left = after;
      ThreadPool::Lease lease(pool);
      allocations_left = -1;
      check(mistakes_of(lease.team(), 20) == 0, "a team created with %d allocations", after);
      return;
    } catch (const std::bad_alloc&) {  // before the first thread
    } catch (const Error& e) {
      check(e.code == DSO_ENOMEM, "code %d", e.code);
    }
    allocations_left = -1;
  }
  check(false, "no team with 8 allocations");
}

void all_take_part() {  // tasks that wait for one another: with one thread missing it would never end
  static std::atomic<int> inside;
  struct Meet final : Job {
    int stage = 0;
    int64_t next() override {
      inside = 0;
      return stage++ == 20 ? -1 : 3;
    }
    void task(int64_t, int) override {
      ++inside;
      while (inside < 3) std::this_thread::yield();
    }
  } job;
  ThreadPool pool(3);
  ThreadPool::Lease lease(pool);
  lease.team().run(job);
}

void sleeps_and_wakes() {  // pauses longer than the spin, between runs and within, on either side
  ThreadPool pool(2);
  ThreadPool::Lease lease(pool);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    Checked job(2, 12, [](int64_t stage, int thread) {
      if (stage % 2 == thread) std::this_thread::sleep_for(std::chrono::microseconds(300));
    });
    lease.team().run(job);
    check(job.mistakes() == 0, "%ld mistakes with pauses", job.mistakes());
  }
}

void callers_take_turns() {
  ThreadPool pool(2);
  int inside = 0;
  long total = 0;
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        ThreadPool::Lease lease(pool);
        check(++inside == 1, "two callers hold one pool");
        total += mistakes_of(lease.team(), 2);
        --inside;
      }
    });
  for (std::thread& c : callers) c.join();
  check(total == 0, "%ld mistakes with four callers", total);
}

void nesting() {
  struct Outer final : Job {
    ThreadPool outer{2}, inner{3};
    long wrong = 0;
    bool opened = false;
    int64_t next() override { return opened ? -1 : (opened = true, 1); }
    void task(int64_t, int) override {
      ThreadPool::Lease within(inner);  // another pool: works
      wrong += mistakes_of(within.team(), 20);
    }
  } job;
  ThreadPool::Lease lease(job.outer);
  lease.team().run(job);
  check(job.wrong == 0, "nesting: %ld mistakes", job.wrong);
  try {
    ThreadPool::Lease again(job.outer);  // the same: would wait for itself
    check(false, "one thread leases a pool twice");
  } catch (const Error& e) {
    check(e.code == DSO_ESTATE, "code %d", e.code);
  }
}

#ifndef _WIN32  // which has no forks and no control groups
int exit_code_of_child(int (*body)(ThreadPool&), ThreadPool& pool) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a deadlock is a failure, not a hang
    _exit(body(pool));
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int use(ThreadPool& pool) {
  ThreadPool::Lease lease(pool);
  return mistakes_of(lease.team(), 50) != 0;
}

void forks() {
  ThreadPool pool(3), unused(2);
  check(exit_code_of_child(use, unused) == 0, "fork before the first use");
  check(use(pool) == 0, "before the fork");
  check(exit_code_of_child(use, pool) == 0, "fork after use");
  check(exit_code_of_child([](ThreadPool& p) { return exit_code_of_child(use, p) | use(p); }, pool) == 0, "a fork's fork");
  {
    ThreadPool::Lease held(pool);  // as if another thread were in a run: the child's copy of the lock stays locked
    check(exit_code_of_child(use, pool) == 0, "fork while a caller holds the pool");
  }
  check(use(pool) == 0, "the parent goes on");
}

void destroys_in_child() {
  auto* pool = new ThreadPool(2);
  use(*pool);
  check(exit_code_of_child(
            [](ThreadPool& p) {
              delete &p;
              return 0;
            },
            *pool) == 0,
        "a child destroys what it inherited");
  delete pool;
}

void cgroups() {
  char folder[] = "/tmp/dso_cgroup_XXXXXX";
  if (!check(mkdtemp(folder) != nullptr, "mkdtemp")) return;
  const std::string root = folder;
  auto write = [&](const std::string& path, const std::string& content) {
    const std::string whole = root + "/" + path;
    std::filesystem::create_directories(whole.substr(0, whole.rfind('/')));
    std::ofstream(whole) << content;
  };
  auto limit = [&](const std::string& membership) {
    write("self", membership);
    return cgroup_cpus(root + "/self", root);
  };
  check(limit("0::/\n") == 0, "no files: no limit");
  write("a/cpu.max", "max 100000\n");
  check(limit("0::/a/b\n") == 0, "max: no limit");
  write("a/cpu.max", "250000 100000\n");
  write("a/b/cpu.max", "600000 100000\n");
  check(limit("0::/a/b\n") == 3, "the parent's 2.5 CPUs are 3");
  write("a/b/cpu.max", "50000 100000\n");
  check(limit("0::/a/b\n") == 1, "half a CPU is 1");
  check(limit("0::/elsewhere\n") == 0, "another group's limit");
  write("cpu/x/cpu.cfs_quota_us", "-1\n");
  write("cpu/x/cpu.cfs_period_us", "100000\n");
  check(limit("4:memory:/a\n2:cpu,cpuacct:/x\n") == 0, "v1 without quota");
  write("cpu/x/cpu.cfs_quota_us", "400000\n");
  check(limit("4:memory:/a\n2:cpuacct,cpu:/x\n") == 4, "v1 quota");
  check(limit("2:cpuset:/x\n") == 0, "cpuset is not cpu");
  check(limit("garbage\n\n:\n") == 0, "a file that makes no sense");
  std::filesystem::remove_all(root);
}
#endif

}  // namespace

int main() {
  stages();
  results_are_seen();
  floats();
  no_memory();
  all_take_part();
  sleeps_and_wakes();
  callers_take_turns();
  nesting();
#ifndef _WIN32
  forks();
  destroys_in_child();
  cgroups();
#endif
  return report("test_pool");
}
