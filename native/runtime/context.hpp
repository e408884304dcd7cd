// A context: the kernels of one ISA and the threads that run them. Shared by the caller's handle and every plan created on it.
#pragma once
#include <atomic>
#include <memory>

#include "arena.hpp"
#include "process_group.hpp"
#include "kernels.hpp"
#include "node_memory.hpp"
#include "thread_pool.hpp"

namespace dso {

struct Context {
  Context(const Kernels& kernels, int threads) : Context(kernels, place_threads({}, threads, true), false) {}
  Context(const Kernels& kernels, ThreadPlaces places, bool copies)
      : kernels(kernels), pool(std::move(places)), copies_mapped(copies) {
    if (pool.places().real)
      memory = std::make_unique<SystemMemory>();
    else
      memory = std::make_unique<RecordedMemory>();
  }
  const Kernels& kernels;
  ThreadPool pool;
  const bool copies_mapped;             // with several memory nodes: pages of mapped files are copied rather than moved
  std::unique_ptr<NodeMemory> memory;   // used only with several memory nodes
  std::atomic<bool> checked{false};     // plans created from now on have red zones
  std::shared_ptr<ProcessGroup> group;  // of plans created from now on; null: they run in this process alone
  Arena scratch;                        // for calls outside a plan; used only under a Lease of the pool
};

}  // namespace dso

struct dso_context {
  std::shared_ptr<dso::Context> shared;
};
