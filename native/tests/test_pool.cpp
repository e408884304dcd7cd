// The thread pool: every thread runs once, barriers order what lies between them, serial work runs once; several pools, callers
// and forks; and how many CPUs a process may use.
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "check.hpp"
#include "cpu_limits.hpp"
#include "error.hpp"
#include "thread_pool.hpp"

namespace {

// Each round every thread writes its place, then reads all others': wrong if a barrier lets one through early.
long mistakes_of(Team& team, int rounds) {
  std::vector<long> place((size_t)team.threads(), -1);
  std::atomic<long> wrong{0};
  long serial = 0;
  team.run([&](int thread) {
    for (long round = 0; round < rounds; ++round) {
      place[(size_t)thread] = round;
      team.barrier.arrive([&] { ++serial; });
      if (serial != round + 1) ++wrong;
      for (long p : place)
        if (p != round) ++wrong;
      team.barrier.arrive();
    }
  });
  return wrong + (serial != rounds);
}

void barriers() {
  for (int n : {1, 2, 3, 5}) {
    ThreadPool pool(n);
    for (int run = 0; run < 3; ++run) {
      ThreadPool::Lease lease(pool);
      const long wrong = mistakes_of(lease.team(), n > 2 ? 200 : 5000);  // more threads than cores: mostly sleeps and wakes
      check(wrong == 0, "%d threads: %ld mistakes", n, wrong);
    }
  }
}

void sleeps_and_wakes() {  // pauses longer than the spin, on either side
  ThreadPool pool(2);
  ThreadPool::Lease lease(pool);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int> ran{0};
    lease.team().run([&](int thread) {
      if (thread == i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      lease.team().barrier.arrive();
      ++ran;
    });
    check(ran == 2, "%d threads ran after a pause", ran.load());
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
  ThreadPool outer(2), inner(3);
  ThreadPool::Lease lease(outer);
  long wrong = 0;
  lease.team().run([&](int thread) {
    if (thread != 0) return;
    ThreadPool::Lease within(inner);  // another pool: works
    wrong += mistakes_of(within.team(), 20);
    try {
      ThreadPool::Lease again(outer);  // the same: would wait for itself
      ++wrong;
    } catch (const Error& e) {
      wrong += e.code != DSO_ESTATE;
    }
  });
  check(wrong == 0, "nesting: %ld mistakes", wrong);
}

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
  check(exit_code_of_child([](ThreadPool& p) { delete &p; return 0; }, *pool) == 0, "a child destroys what it inherited");
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
  check(default_threads() >= 1 && default_threads() <= (int)std::thread::hardware_concurrency(), "default_threads() is %d", default_threads());
}

}  // namespace

int main() {
  barriers();
  sleeps_and_wakes();
  callers_take_turns();
  nesting();
  forks();
  destroys_in_child();
  cgroups();
  return report("test_pool");
}
