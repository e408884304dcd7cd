// The processes that run one model together, on one machine. They share a file in memory: counters, a ring of bytes
// from the leader (rank 0) to the others, and regions in which plans exchange rows.
//
// All processes run the same plans over batches of the same sizes in the same order, so each of them counts exchanges by
// itself: exchange n uses the half n % 2 of the regions. A process that writes its part of exchange n + 2 has received all
// parts of n + 1, whose owners had finished reading n. So one barrier per exchange is enough.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "dso.h"

namespace dso {

class ProcessGroup {
 public:
  ProcessGroup(int fd, int32_t rank, int32_t ranks);
  ~ProcessGroup();
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int32_t rank() const { return rank_; }
  int32_t ranks() const { return ranks_; }

  void send(const uint8_t* data, int64_t bytes);  // rank 0
  void receive(uint8_t* data, int64_t bytes);     // the others

  void lose(int32_t rank);
  int32_t lost() const;      // the rank of the first process that ended, or -1
  void check_alive() const;  // Error DSO_ELOST if one has ended

  // An exchange of up to `bytes` from each process: allocates regions. Called in the same order by all processes.
  void reserve(int64_t bytes);
  void begin();                       // of the next exchange
  uint8_t* part(int32_t rank) const;  // of the current exchange, aligned to a cache line
  void exchange();                    // this process's part is complete: waits for all others; returns early if one is lost

 private:
  struct Shared;
  template <class Ready>
  bool spin(uint64_t longest, const Ready& ready);  // for so many ticks; false: in vain
  template <class Ready>
  bool sleep(const Ready& ready);  // false: a process is lost
  template <class Ready>
  bool wait(const Ready& ready);  // spins, then sleeps; false: a process is lost
  void arrived();                 // wakes those that wait
  uint8_t* map(int64_t offset, int64_t bytes) const;

  const int fd_;
  const int32_t rank_, ranks_;
  const uint64_t spin_ticks_, most_exchange_spin_ticks_;
  uint64_t exchange_spin_ticks_ = most_exchange_spin_ticks_;
  const int64_t head_bytes_;  // of the counters, in whole pages
  Shared* shared_ = nullptr;
  uint8_t* ring_ = nullptr;
  int64_t end_ = 0;  // of the file, as far as this process has used it
  uint8_t* regions_ = nullptr;
  int64_t region_bytes_ = 0;
  uint64_t exchanges_ = 0;
};

}  // namespace dso

struct dso_group {
  std::shared_ptr<dso::ProcessGroup> shared;
};
