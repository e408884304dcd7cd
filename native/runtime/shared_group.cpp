#include "shared_group.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "error.hpp"
#include "files.hpp"
#include "layout.hpp"
#include "memory.hpp"
#include "threads.hpp"
#include "waiting.hpp"

namespace dso {
namespace {

constexpr int64_t kRingBytes = 1 << 20;
constexpr double kLookAfter = 0.2;  // seconds between two looks whether the parent is still there

struct alignas(64) Counter {
  std::atomic<uint64_t> value{0};
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free, "shared memory");

}  // namespace

struct SharedGroup::Shared {                  // zero bytes are its initial state
  alignas(64) std::atomic<uint32_t> changes;  // counts what others may wait for
  std::atomic<uint32_t> sleepers;
  std::atomic<int32_t> lost;    // 1 + rank; 0: none
  std::atomic<int64_t> leader;  // its process id
  Counter sent;                 // bytes, by the leader
  Counter taken[kMostRanks];    // bytes, by each of the others
  Counter arrived[kMostRanks];  // number of the last exchange whose part is complete
};

SharedGroup::SharedGroup(int fd, int32_t rank, int32_t ranks)
    : ProcessGroup(rank, ranks),
      fd_(duplicate_file(fd)),
      spin_ticks_(spin_ticks(kSpinSeconds)),
      head_bytes_(round_up(int64_t(sizeof(Shared)), page_bytes())) {
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

SharedGroup::~SharedGroup() {
  if (regions_) unmap_memory(regions_, 2 * ranks() * region_bytes_);
  unmap_memory(ring_, kRingBytes);
  unmap_memory(shared_, head_bytes_);
  close_file(fd_);
}

// Every process allocates the same range; the first one's pages stay.
uint8_t* SharedGroup::map(int64_t offset, int64_t bytes) const {
  void* const at = map_shared_file(fd_, offset, bytes);
  if (!at) fail(DSO_ENOMEM, "%lld bytes that processes share: %s", (long long)bytes, strerror(errno));
  return static_cast<uint8_t*>(at);
}

int32_t SharedGroup::lost() const { return shared_->lost.load() - 1; }

void SharedGroup::lose(int32_t rank) {
  check_rank(rank);
  int32_t none = 0;
  shared_->lost.compare_exchange_strong(none, rank + 1);
  arrived();
}

void SharedGroup::arrived() {
  shared_->changes.fetch_add(1);
  if (shared_->sleepers.load() > 0) wake_all(shared_->changes, Waiters::kProcesses);
}

template <class Ready>
bool SharedGroup::sleep(const Ready& ready) {
  for (;;) {
    // As in Team::wait: either the other process sees this sleeper, or the futex sees the change.
    const uint32_t changes = shared_->changes.load();
    if (lost() >= 0) return false;
    if (ready()) return true;
    shared_->sleepers.fetch_add(1);
    if (!ready()) wait_while(shared_->changes, changes, Waiters::kProcesses, kLookAfter);
    shared_->sleepers.fetch_sub(1);
    if (rank() > 0 && parent_process() != shared_->leader.load()) lose(0);
  }
}

template <class Ready>
bool SharedGroup::wait(const Ready& ready) {
  return spin_for(spin_ticks_, ready) || sleep(ready);
}

void SharedGroup::send(const uint8_t* data, int64_t bytes) {
  if (rank() != 0) fail(DSO_EINVAL, "rank %d cannot send: only rank 0 does", rank());
  const auto room = [&] {
    uint64_t oldest = shared_->sent.value.load();
    for (int32_t r = 1; r < ranks(); ++r) oldest = std::min(oldest, shared_->taken[r].value.load());
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

void SharedGroup::receive(uint8_t* data, int64_t bytes) {
  if (rank() == 0) fail(DSO_EINVAL, "rank 0 cannot receive: it sends");
  std::atomic<uint64_t>& taken = shared_->taken[rank()].value;
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
void SharedGroup::reserve(int64_t bytes) {
  if (bytes <= region_bytes_) return;
  const int64_t size = round_up(std::max(bytes, 2 * region_bytes_), page_bytes()), all = 2 * ranks() * size;
  uint8_t* const fresh = map(end_, all);
  if (regions_) unmap_memory(regions_, 2 * ranks() * region_bytes_);
  regions_ = fresh;
  region_bytes_ = size;
  end_ += all;
}

uint8_t* SharedGroup::part(int32_t rank) const { return regions_ + (int64_t(exchanges_ % 2) * ranks() + rank) * region_bytes_; }

void SharedGroup::exchange(const int64_t*) {
  shared_->arrived[rank()].value.store(exchanges_);
  arrived();
  int32_t there = 0;  // ranks below have arrived
  const auto all = [&] {
    while (there < ranks() && shared_->arrived[there].value.load() >= exchanges_) ++there;
    return there == ranks();
  };
  if (!spin_(all)) sleep(all);
}

}  // namespace dso
