// A context: the kernels of one ISA and the threads that run them. Shared by the caller's handle and every plan created on it.
#pragma once
#include <atomic>
#include <memory>

#include "arena.hpp"
#include "process_group.hpp"
#include "kernels.hpp"
#include "thread_pool.hpp"

namespace dso {

struct Context {
  Context(const Kernels& kernels, int threads) : kernels(kernels), pool(threads) {}
  const Kernels& kernels;
  ThreadPool pool;
  std::atomic<bool> checked{false};     // plans created from now on have red zones
  std::shared_ptr<ProcessGroup> group;  // of plans created from now on; null: they run in this process alone
  Arena scratch;                        // for calls outside a plan; used only under a Lease of the pool
};

}  // namespace dso

struct dso_context {
  std::shared_ptr<dso::Context> shared;
};
