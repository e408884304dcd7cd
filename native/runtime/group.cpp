#include "group.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

#include <algorithm>
#include <cstring>

#include "error.hpp"
#include "layout.hpp"
#include "waiting.hpp"

namespace dso {
namespace {

constexpr int32_t kMostRanks = 64;
constexpr int64_t kPage = 4096, kRingBytes = 1 << 20;
constexpr double kLookAfter = 0.2;  // seconds between two looks whether the parent is still there

struct alignas(64) Counter {
  std::atomic<uint64_t> value{0};
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free, "shared memory");

}  // namespace

struct Group::Shared {                        // zero bytes are its initial state
  alignas(64) std::atomic<uint32_t> changes;  // counts what others may wait for
  std::atomic<uint32_t> sleepers;
  std::atomic<int32_t> lost;    // 1 + rank; 0: none
  std::atomic<int32_t> leader;  // its process id
  Counter sent;                 // bytes, by the leader
  Counter taken[kMostRanks];    // bytes, by each of the others
  Counter arrived[kMostRanks];  // number of the last exchange whose part is complete
};

Group::Group(int fd, int32_t rank, int32_t ranks)
    : fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)), rank_(rank), ranks_(ranks), spin_ticks_(spin_ticks(kSpinSeconds)) {
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks) {
    if (fd_ >= 0) close(fd_);
    fail(DSO_EINVAL, "rank is %d of %d, must be below, and there are at most %d", rank, ranks, kMostRanks);
  }
  if (fd_ < 0) fail(DSO_EINVAL, "fd is %d, which cannot be duplicated: %s", fd, strerror(errno));
  try {
    static_assert(sizeof(Shared) <= 3 * kPage);
    shared_ = reinterpret_cast<Shared*>(map(0, 3 * kPage));
    ring_ = map(3 * kPage, kRingBytes);
  } catch (...) {
    if (shared_) munmap(shared_, 3 * kPage);
    close(fd_);
    throw;
  }
  end_ = 3 * kPage + kRingBytes;
  if (rank == 0) shared_->leader = getpid();
}

Group::~Group() {
  if (regions_) munmap(regions_, size_t(2 * ranks_ * region_bytes_));
  munmap(ring_, kRingBytes);
  munmap(shared_, 3 * kPage);
  close(fd_);
}

// Every process allocates the same range; the first one's pages stay.
uint8_t* Group::map(int64_t offset, int64_t bytes) const {
  const int code = posix_fallocate(fd_, offset, bytes);
  if (code != 0) fail(DSO_ENOMEM, "%lld bytes that processes share: %s", (long long)bytes, strerror(code));
  void* const at = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, offset);
  if (at == MAP_FAILED) fail(DSO_ENOMEM, "%lld bytes that processes share: %s", (long long)bytes, strerror(errno));
  return static_cast<uint8_t*>(at);
}

int32_t Group::lost() const { return shared_->lost.load() - 1; }

void Group::check_alive() const {
  if (lost() >= 0) fail(DSO_ELOST, "rank %d of %d", lost(), ranks_);
}

void Group::lose(int32_t rank) {
  if (rank < 0 || rank >= ranks_) fail(DSO_EINVAL, "rank is %d, must be below %d", rank, ranks_);
  int32_t none = 0;
  shared_->lost.compare_exchange_strong(none, rank + 1);
  arrived();
}

void Group::arrived() {
  shared_->changes.fetch_add(1);
  if (shared_->sleepers.load() > 0) wake_all(&shared_->changes, Waiters::kProcesses);
}

template <class Ready>
bool Group::wait(const Ready& ready) {
  for (const uint64_t start = __rdtsc(); __rdtsc() - start < spin_ticks_;) {
    if (ready()) return true;
    _mm_pause();
  }
  for (;;) {
    // As in Team::wait: either the other process sees this sleeper, or the futex sees the change.
    const uint32_t changes = shared_->changes.load();
    if (lost() >= 0) return false;
    if (ready()) return true;
    shared_->sleepers.fetch_add(1);
    if (!ready()) sleep_while(&shared_->changes, changes, Waiters::kProcesses, kLookAfter);
    shared_->sleepers.fetch_sub(1);
    if (rank_ > 0 && getppid() != shared_->leader.load()) lose(0);
  }
}

void Group::send(const uint8_t* data, int64_t bytes) {
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

void Group::receive(uint8_t* data, int64_t bytes) {
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
void Group::reserve(int64_t bytes) {
  if (bytes <= region_bytes_) return;
  const int64_t size = round_up(std::max(bytes, 2 * region_bytes_), kPage), all = 2 * ranks_ * size;
  uint8_t* const fresh = map(end_, all);
  if (regions_) munmap(regions_, size_t(2 * ranks_ * region_bytes_));
  regions_ = fresh;
  region_bytes_ = size;
  end_ += all;
}

void Group::begin() { ++exchanges_; }

uint8_t* Group::part(int32_t rank) const { return regions_ + (int64_t(exchanges_ % 2) * ranks_ + rank) * region_bytes_; }

void Group::exchange() {
  shared_->arrived[rank_].value.store(exchanges_);
  arrived();
  for (int32_t r = 0; r < ranks_; ++r)
    if (!wait([&] { return shared_->arrived[r].value.load() >= exchanges_; })) return;
}

}  // namespace dso
