// Threads that work through a job together: a sequence of stages, each with a number of independent tasks; a stage starts when
// the one before it is finished.
//
// There is no barrier that all threads must reach. The thread that finishes a stage's last task opens the next one, and a
// thread that holds no task is not waited for: one that the system has descheduled (another process uses its core) or that is
// still waking up joins when it can. Waiting threads spin for tens of microseconds (a decode step has over a hundred stages,
// and waking up costs more than most of them), then sleep; with more threads than CPUs they sleep at once, since a spinning
// thread would keep one that has work from running.
//
// With several memory nodes, a stage's first tasks belong to nodes, those that have the weights that they read: only threads of
// the node take them. Any thread takes the others, after those of its node.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "thread_places.hpp"

namespace dso {

class Job {  // neither member function may throw
 public:
  // Called by one thread while no task is running: does work that is not worth sharing, then opens the next stage. Returns its
  // number of tasks, 0 for none, -1 when the job is done.
  virtual int64_t next() = 0;
  virtual void task(int64_t index, int thread) = 0;  // index in [0, tasks of the stage)
  // With several nodes: tasks [node_end(i - 1), node_end(i)) belong to node i. Called after `next` by the same thread.
  virtual int64_t node_end(int) const { return 0; }

 protected:
  ~Job() = default;
};

class Team {  // the threads of `places`, including the caller
 public:
  explicit Team(const ThreadPlaces& places);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  void run(Job& job);  // returns when the job is done; the caller is thread 0
  int threads() const { return threads_; }
  // Since the team was created: stages with tasks, each of which hands the work over from one thread to all; and how often a
  // thread stopped spinning and slept.
  int64_t stages() const { return stages_; }
  int64_t sleeps() const { return sleeps_.load(std::memory_order_relaxed); }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> untaken{0};  // tasks left of those before `end`; negative after late attempts to take one
    int64_t end = 0;                  // as job_
  };

  void serve(int thread);
  int64_t take(Share& share, int thread);  // all that it can; returns how many
  void advance();
  void publish();
  void wait(uint32_t phase);
  void stop();

  const ThreadPlaces places_;
  const int threads_;
  const uint64_t spin_ticks_;
  // Written by the advancing thread while no task is taken; read by threads that hold one.
  Job* job_ = nullptr;
  int64_t stages_ = 0;
  std::atomic<bool> finished_{true}, stop_{false};

  Share any_;                             // the tasks of the stage that belong to no node
  const std::unique_ptr<Share[]> nodes_;  // and those of each node; null: there is one node
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // counts stages: waiting threads watch it
  std::atomic<int> sleepers_{0};
  std::atomic<int64_t> sleeps_{0};
  std::vector<std::thread> workers_;
};

// The team of a context: created at the first use, recreated in a forked child (threads do not survive a fork), and lent to one
// caller at a time.
class ThreadPool {
  struct Owned;

 public:
  explicit ThreadPool(ThreadPlaces places) : places_(std::move(places)) {}
  explicit ThreadPool(int threads) : ThreadPool(place_threads({}, threads, true)) {}
  ~ThreadPool();
  const ThreadPlaces& places() const { return places_; }
  int threads() const { return places_.threads(); }

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

  const ThreadPlaces places_;
  std::atomic<Owned*> owned_{nullptr};
};

}  // namespace dso
