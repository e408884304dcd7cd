// The processes that run one model together, and the exchange of rows between their plans. Where the rows pass through is up to
// the implementation: memory that the processes share (shared_group.hpp) or connections (socket_group.hpp).
#pragma once
#include <cstdint>
#include <memory>

#include "dso.h"

namespace dso {

class ProcessGroup {
 public:
  ProcessGroup(int32_t rank, int32_t ranks);  // DSO_EINVAL if there is no such rank
  virtual ~ProcessGroup() = default;
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  int32_t rank() const { return rank_; }
  int32_t ranks() const { return ranks_; }

  // Bytes from rank 0 to all others.
  virtual void send(const uint8_t* data, int64_t bytes) = 0;
  virtual void receive(uint8_t* data, int64_t bytes) = 0;

  virtual void lose(int32_t rank) = 0;
  virtual int32_t look() = 0;        // the rank of the first process that ended, or -1; may ask the system
  virtual int32_t lost() const = 0;  // the same as far as it is known
  void check_alive() const;          // Error DSO_ELOST if one has ended

  // An exchange of up to `bytes` from each process: allocates regions. Called in the same order by all processes.
  virtual void reserve(int64_t bytes) = 0;
  virtual void begin() = 0;                       // of the next exchange
  virtual uint8_t* part(int32_t rank) const = 0;  // of the current exchange, aligned to a cache line
  // This process's part is complete: waits for all others; returns early if one is lost. bytes: of each rank's part.
  virtual void exchange(const int64_t* bytes) = 0;

  static constexpr int32_t kMostRanks = 64;

 protected:
  void check_rank(int32_t rank) const;  // DSO_EINVAL

 private:
  const int32_t rank_, ranks_;
};

}  // namespace dso

struct dso_group {
  std::shared_ptr<dso::ProcessGroup> shared;
};
