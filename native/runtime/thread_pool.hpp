// A team of threads that run one function together (SPMD) and meet at barriers.
//
// Between runs the team waits at the same barrier that it uses within them: the caller's arrival is the start signal. A
// waiter spins for tens of microseconds (a decode step has over a hundred barriers, and a futex wake costs more than the
// work between two of them), then sleeps, so that a core taken by another process is not also burnt by us.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace dso {

class Barrier {
 public:
  explicit Barrier(int threads);
  // The last thread to arrive runs `work` before any is let go: a serial step costs no barrier of its own.
  template <class Work>
  void arrive(Work&& work) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);  // cannot change before this thread arrives
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_) return wait(phase);
    work();
    arrived_.store(0, std::memory_order_relaxed);
    release();
  }
  void arrive() {
    arrive([] {});
  }
  void abandon(int waiting);  // lets go `waiting` threads though others never came

 private:
  void wait(uint32_t phase);
  void release();

  const int threads_;
  const uint64_t spin_ticks_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::atomic<int> sleepers_{0};
};

class Team {  // `threads` of them, the caller included
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // f(thread) on every thread, 0 being the caller; returns when all have returned. f must not throw.
  template <class F>
  void run(F&& f) {
    job_ = [](void* f, int thread) { (*static_cast<std::remove_reference_t<F>*>(f))(thread); };
    argument_ = const_cast<void*>(static_cast<const void*>(std::addressof(f)));
    barrier.arrive();
    f(0);
    barrier.arrive();
  }
  int threads() const { return threads_; }
  Barrier barrier;

 private:
  void work(int thread);

  const int threads_;
  void (*job_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// The team of a context: made at the first use, made anew in a forked child (threads do not survive a fork), and
// lent to one caller at a time.
class ThreadPool {
  struct Owned;

 public:
  explicit ThreadPool(int threads) : threads_(threads) {}
  ~ThreadPool();
  int threads() const { return threads_; }

  class Lease {
   public:
    explicit Lease(ThreadPool& pool);  // waits for other callers; an Error if this thread holds it already
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Team& team() { return *team_; }

   private:
    Owned* owned_;
    Team* team_;
  };

 private:
  Owned* owned();

  const int threads_;
  std::atomic<Owned*> owned_{nullptr};
};

}  // namespace dso
