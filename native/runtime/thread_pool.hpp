// Threads that work through a job together: a sequence of stages, each with a number of independent tasks; a stage starts when
// the one before it is finished.
//
// There is no barrier that all threads must reach. The thread that finishes a stage's last task opens the next one, and a
// thread that holds no task is not waited for: one that the system has descheduled (another process uses its core) or that is
// still waking up joins when it can. Waiting threads spin for tens of microseconds (a decode step has over a hundred stages,
// and waking up costs more than most of them), then sleep.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dso {

class Job {  // neither member function may throw
 public:
  // Called by one thread while no task is running: does work that is not worth sharing, then opens the next stage. Returns its
  // number of tasks, 0 for none, -1 when the job is done.
  virtual int64_t next() = 0;
  virtual void task(int64_t index, int thread) = 0;  // index in [0, tasks of the stage)

 protected:
  ~Job() = default;
};

class Team {  // `threads` threads, including the caller
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  void run(Job& job);  // returns when the job is done; the caller is thread 0
  int threads() const { return threads_; }

 private:
  void serve(int thread);
  void advance();
  void publish();
  void wait(uint32_t phase);
  void stop();

  const int threads_;
  const uint64_t spin_ticks_;
  // Written by the advancing thread while no task is taken; read by threads that hold one.
  Job* job_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<bool> finished_{true}, stop_{false};

  alignas(64) std::atomic<int64_t> untaken_{0};  // tasks left in the stage; negative after late attempts to take one
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // counts stages: waiting threads watch it
  std::atomic<int> sleepers_{0};
  std::vector<std::thread> workers_;
};

// The team of a context: created at the first use, recreated in a forked child (threads do not survive a fork), and lent to one
// caller at a time.
class ThreadPool {
  struct Owned;

 public:
  explicit ThreadPool(int threads) : threads_(threads) {}
  ~ThreadPool();
  int threads() const { return threads_; }

  class Lease {
   public:
    explicit Lease(ThreadPool& pool);  // waits for other callers; an Error if this thread already holds it
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
