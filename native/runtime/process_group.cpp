#include "process_group.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.hpp"
#include "files.hpp"
#include "layout.hpp"
#include "memory.hpp"
#include "processor.hpp"
#include "spinning.hpp"
#include "threads.hpp"
#include "waiting.hpp"

namespace dso {
namespace {

constexpr int32_t kMostRanks = 64;
constexpr int64_t kRingBytes = 1 << 20;
constexpr double kLookAfter = 0.2;  // seconds between two looks whether the parent is still there
// How long an exchange spins at most. Processes have fixed shares of a stage's work, so they arrive farther apart than the
// threads of a pool.
constexpr double kExchangeSpinSeconds = 300e-6;

struct alignas(64) Counter {
  std::atomic<uint64_t> value{0};
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free, "shared memory");

}  // namespace

struct ProcessGroup::Shared {                 // zero bytes are its initial state
  alignas(64) std::atomic<uint32_t> changes;  // counts what others may wait for
  std::atomic<uint32_t> sleepers;
  std::atomic<int32_t> lost;    // 1 + rank; 0: none
  std::atomic<int64_t> leader;  // its process id
  Counter sent;                 // bytes, by the leader
  Counter taken[kMostRanks];    // bytes, by each of the others
  Counter arrived[kMostRanks];  // number of the last exchange whose part is complete
};

ProcessGroup::ProcessGroup(int fd, int32_t rank, int32_t ranks)
    : fd_(duplicate_file(fd)),
      rank_(rank),
      ranks_(ranks),
      spin_ticks_(spin_ticks(kSpinSeconds)),
      most_exchange_spin_ticks_(spin_ticks(kExchangeSpinSeconds)),
      head_bytes_(round_up(int64_t(sizeof(Shared)), page_bytes())) {
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks) {
    if (fd_ >= 0) close_file(fd_);
    fail(DSO_EINVAL, "rank is %d of %d, must be below, and there are at most %d", rank, ranks, kMostRanks);
  }
  if (fd_ < 0) fail(DSO_EINVAL, "fd is %d, which cannot be duplicated: %s", fd, strerror(errno));
  try {
    shared_ = reinterpret_cast<Shared*>(map(0, head_bytes_));
    ring_ = map(head_bytes_, kRingBytes);
  } catch (...) {
    if (shared_) unmap_memory(shared_, head_bytes_);
    close_file(fd_);
    throw;
  }
  end_ = head_bytes_ + kRingBytes;
  if (rank == 0) shared_->leader = process_number();
}

ProcessGroup::~ProcessGroup() {
  if (regions_) unmap_memory(regions_, 2 * ranks_ * region_bytes_);
  unmap_memory(ring_, kRingBytes);
  unmap_memory(shared_, head_bytes_);
  close_file(fd_);
}

// Every process allocates the same range; the first one's pages stay.
uint8_t* ProcessGroup::map(int64_t offset, int64_t bytes) const {
  void* const at = map_shared_file(fd_, offset, bytes);
  if (!at) fail(DSO_ENOMEM, "%lld bytes that processes share: %s", (long long)bytes, strerror(errno));
  return static_cast<uint8_t*>(at);
}

int32_t ProcessGroup::lost() const { return shared_->lost.load() - 1; }

void ProcessGroup::check_alive() const {
  if (lost() >= 0) fail(DSO_ELOST, "rank %d of %d", lost(), ranks_);
}

void ProcessGroup::lose(int32_t rank) {
  if (rank < 0 || rank >= ranks_) fail(DSO_EINVAL, "rank is %d, must be below %d", rank, ranks_);
  int32_t none = 0;
  shared_->lost.compare_exchange_strong(none, rank + 1);
  arrived();
}

void ProcessGroup::arrived() {
  shared_->changes.fetch_add(1);
  if (shared_->sleepers.load() > 0) wake_all(shared_->changes, Waiters::kProcesses);
}

template <class Ready>
bool ProcessGroup::spin(uint64_t longest, const Ready& ready) {
  for (const uint64_t start = ticks(); ticks() - start < longest;) {
    if (ready()) return true;
    relax();
  }
  return false;
}

template <class Ready>
bool ProcessGroup::sleep(const Ready& ready) {
  for (;;) {
    // As in Team::wait: either the other process sees this sleeper, or the futex sees the change.
    const uint32_t changes = shared_->changes.load();
    if (lost() >= 0) return false;
    if (ready()) return true;
    shared_->sleepers.fetch_add(1);
    if (!ready()) wait_while(shared_->changes, changes, Waiters::kProcesses, kLookAfter);
    shared_->sleepers.fetch_sub(1);
    if (rank_ > 0 && parent_process() != shared_->leader.load()) lose(0);
  }
}

template <class Ready>
bool ProcessGroup::wait(const Ready& ready) {
  return spin(spin_ticks_, ready) || sleep(ready);
}

void ProcessGroup::send(const uint8_t* data, int64_t bytes) {
  if (rank_ != 0) fail(DSO_EINVAL, "rank %d cannot send: only rank 0 does", rank_);
  const auto room = [&] {
    uint64_t oldest = shared_->sent.value.load();
    for (int32_t r = 1; r < ranks_; ++r) oldest = std::min(oldest, shared_->taken[r].value.load());
    return kRingBytes - int64_t(shared_->sent.value.load() - oldest);
  };
  while (bytes > 0) {
    if (!wait([&] { return room() > 0; })) check_alive();
    const int64_t at = int64_t(shared_->sent.value.load() % kRingBytes);
    const int64_t n = std::min({bytes, room(), kRingBytes - at});
    std::memcpy(ring_ + at, data, size_t(n));
    shared_->sent.value.fetch_add(uint64_t(n));
    arrived();
    data += n;
    bytes -= n;
  }
}

void ProcessGroup::receive(uint8_t* data, int64_t bytes) {
  if (rank_ == 0) fail(DSO_EINVAL, "rank 0 cannot receive: it sends");
  std::atomic<uint64_t>& taken = shared_->taken[rank_].value;
  const auto ready = [&] { return int64_t(shared_->sent.value.load() - taken.load()); };
  while (bytes > 0) {
    if (!wait([&] { return ready() > 0; })) check_alive();
    const int64_t at = int64_t(taken.load() % kRingBytes), n = std::min({bytes, ready(), kRingBytes - at});
    std::memcpy(data, ring_ + at, size_t(n));
    taken.fetch_add(uint64_t(n));
    arrived();
    data += n;
    bytes -= n;
  }
}

// New regions lie after the old ones: another process may still be reading those.
void ProcessGroup::reserve(int64_t bytes) {
  if (bytes <= region_bytes_) return;
  const int64_t size = round_up(std::max(bytes, 2 * region_bytes_), page_bytes()), all = 2 * ranks_ * size;
  uint8_t* const fresh = map(end_, all);
  if (regions_) unmap_memory(regions_, 2 * ranks_ * region_bytes_);
  regions_ = fresh;
  region_bytes_ = size;
  end_ += all;
}

void ProcessGroup::begin() { ++exchanges_; }

uint8_t* ProcessGroup::part(int32_t rank) const { return regions_ + (int64_t(exchanges_ % 2) * ranks_ + rank) * region_bytes_; }

void ProcessGroup::exchange() {
  shared_->arrived[rank_].value.store(exchanges_);
  arrived();
  int32_t there = 0;  // ranks below have arrived
  const auto all = [&] {
    while (there < ranks_ && shared_->arrived[there].value.load() >= exchanges_) ++there;
    return there == ranks_;
  };
  // Less and less while it is in vain: with fewer cores than processes, the one that is waited for needs this core.
  if (spin(exchange_spin_ticks_, all)) {
    exchange_spin_ticks_ = std::min(exchange_spin_ticks_ + exchange_spin_ticks_ / 8, most_exchange_spin_ticks_);
  } else {
    exchange_spin_ticks_ = std::max(exchange_spin_ticks_ / 2, spin_ticks_);
    sleep(all);
  }
}

}  // namespace dso
