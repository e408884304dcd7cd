// A group on one machine. Its processes share a file in memory: counters, a ring of bytes from the leader (rank 0) to the
// others, and regions in which plans exchange rows.
//
// All processes run the same plans over batches of the same sizes in the same order, so each of them counts exchanges by
// itself: exchange n uses the half n % 2 of the regions. A process that writes its part of exchange n + 2 has received all
// parts of n + 1, whose owners had finished reading n. So one barrier per exchange is enough.
#pragma once
#include "process_group.hpp"
#include "spinning.hpp"

namespace dso {

class SharedGroup final : public ProcessGroup {
 public:
  SharedGroup(int fd, int32_t rank, int32_t ranks);
  ~SharedGroup() override;

  void send(const uint8_t* data, int64_t bytes) override;
  void receive(uint8_t* data, int64_t bytes) override;
  void lose(int32_t rank) override;
  int32_t look() override { return lost(); }
  int32_t lost() const override;
  void reserve(int64_t bytes) override;
  void begin() override { ++exchanges_; }
  uint8_t* part(int32_t rank) const override;
  void exchange(const int64_t* bytes) override;

 private:
  struct Shared;
  template <class Ready>
  bool sleep(const Ready& ready);  // false: a process is lost
  template <class Ready>
  bool wait(const Ready& ready);  // spins, then sleeps; false: a process is lost
  void arrived();                 // wakes those that wait
  uint8_t* map(int64_t offset, int64_t bytes) const;

  const int fd_;
  const uint64_t spin_ticks_;
  ExchangeSpin spin_;
  const int64_t head_bytes_;  // of the counters, in whole pages
  Shared* shared_ = nullptr;
  uint8_t* ring_ = nullptr;
  int64_t end_ = 0;  // of the file, as far as this process has used it
  uint8_t* regions_ = nullptr;
  int64_t region_bytes_ = 0;
  uint64_t exchanges_ = 0;
};

}  // namespace dso
