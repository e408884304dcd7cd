#include "thread_pool.hpp"

#include <exception>

#include "error.hpp"
#include "memory_nodes.hpp"
#include "processor.hpp"
#include "spinning.hpp"
#include "threads.hpp"
#include "waiting.hpp"

namespace dso {

namespace {
// To which CPUs a thread is bound: none on a machine with one node, where the system knows best.
std::vector<int32_t> cpus_of(const ThreadPlaces& places, int thread) {
  if (!places.split() || !places.real) return {};
  return places.nodes[size_t(places.node_of(thread))].cpus;
}
}  // namespace

Team::Team(const ThreadPlaces& places)
    : places_(places),
      threads_(places.threads()),
      spin_ticks_(threads_ > 1 && threads_ <= int(allowed_cpus().size()) ? spin_ticks(kSpinSeconds) : 0),
      nodes_(places.split() ? std::make_unique<Share[]>(places.nodes.size()) : nullptr) {
  SignalsBlocked blocked;
  try {
    workers_.reserve(threads_ - 1);
    for (int t = 1; t < threads_; ++t) {
      workers_.emplace_back([this, t] {
        become_worker("dso-worker");
        FloatSettings floats;
        BoundThread bound(cpus_of(places_, t));
        serve(t);
      });
    }
  } catch (const std::exception& e) {  // no thread available (system_error), or no memory for its handle
    stop();
    fail(DSO_ENOMEM, "could not start thread %zu of %d: %s", workers_.size() + 1, threads_, e.what());
  }
}

Team::~Team() { stop(); }

void Team::stop() {
  stop_ = true;
  publish();
  for (std::thread& w : workers_) w.join();
}

void Team::run(Job& job) {
  FloatSettings floats;
  BoundThread bound(cpus_of(places_, 0));
  job_ = &job;
  finished_.store(false, std::memory_order_relaxed);
  advance();
  serve(0);
}

int64_t Team::take(Share& share, int thread) {
  int64_t done = 0;
  for (int64_t n; (n = share.untaken.fetch_sub(1, std::memory_order_acq_rel)) > 0; ++done) job_->task(share.end - n, thread);
  return done;
}

void Team::serve(int thread) {
  Share* const own = nodes_ ? &nodes_[places_.node_of(thread)] : nullptr;
  for (;;) {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (thread == 0 ? finished_.load(std::memory_order_acquire) : stop_.load(std::memory_order_relaxed)) return;
    // A taken task keeps its stage open, so all tasks taken here belong to one stage, though it may be newer than `phase`.
    int64_t done = own ? take(*own, thread) : 0;
    done += take(any_, thread);
    if (done > 0 && unfinished_.fetch_sub(done, std::memory_order_acq_rel) == done)
      advance();
    else
      wait(phase);
  }
}

void Team::advance() {
  int64_t n;
  while ((n = job_->next()) == 0) {
  }
  if (n < 0) {
    finished_.store(true, std::memory_order_release);  // the caller may see this before the new phase, and return
    return publish();                                  // from here on the job may be destroyed
  }
  ++stages_;
  unfinished_.store(n, std::memory_order_relaxed);
  const auto open = [](Share& share, int64_t begin, int64_t end) {
    share.end = end;
    share.untaken.store(end - begin, std::memory_order_release);
  };
  // A node's tasks may be finished before those of the next are opened; the stage ends with the last of all.
  int64_t begin = 0;
  for (int i = 0; nodes_ && i < places_.nodes_count(); ++i) {
    const int64_t end = job_->node_end(i);
    open(nodes_[i], begin, end);
    begin = end;
  }
  open(any_, begin, n);
  publish();
}

void Team::publish() {
  phase_.fetch_add(1);
  if (sleepers_.load() > 0) wake_all(phase_, Waiters::kThreads);
}

void Team::wait(uint32_t phase) {
  for (const uint64_t start = ticks(); ticks() - start < spin_ticks_;) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    relax();
  }
  // Either publish() sees this sleeper, or wait_while() sees the new phase: both sides store, then load, in one total order.
  sleepers_.fetch_add(1);
  sleeps_.fetch_add(1, std::memory_order_relaxed);
  while (phase_.load() == phase) wait_while(phase_, phase, Waiters::kThreads);
  sleepers_.fetch_sub(1);
}

struct ThreadPool::Owned {
  explicit Owned(int64_t pid) : pid(pid) {}
  const int64_t pid;
  std::mutex mutex;
  std::atomic<std::thread::id> holder{};
  std::unique_ptr<Team> team;
};

ThreadPool::~ThreadPool() {
  Owned* o = owned_.load();
  if (o && o->pid == process_number()) delete o;  // after a fork its threads belong to the parent: nothing to join
}

ThreadPool::Owned* ThreadPool::owned() {
  const int64_t pid = process_number();
  Owned* current = owned_.load(std::memory_order_acquire);
  while (!current || current->pid != pid) {
    // The parent's mutex may be locked and its threads do not exist here: the child abandons both, untouched.
    auto fresh = std::make_unique<Owned>(pid);
    if (owned_.compare_exchange_strong(current, fresh.get(), std::memory_order_acq_rel)) return fresh.release();
  }
  return current;
}

ThreadPool::Lease::Lease(ThreadPool& pool) : owned_(pool.owned()) {
  if (owned_->holder.load(std::memory_order_relaxed) == std::this_thread::get_id())
    fail(DSO_ESTATE, "a run was started from inside a run on the same context");
  owned_->mutex.lock();
  try {
    if (!owned_->team) owned_->team = std::make_unique<Team>(pool.places());
  } catch (...) {
    owned_->mutex.unlock();
    throw;
  }
  owned_->holder.store(std::this_thread::get_id(), std::memory_order_relaxed);
  team_ = owned_->team.get();
}

ThreadPool::Lease::~Lease() {
  owned_->holder.store(std::thread::id(), std::memory_order_relaxed);
  owned_->mutex.unlock();
}

}  // namespace dso
