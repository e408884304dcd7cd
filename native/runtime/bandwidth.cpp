#include "bandwidth.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <utility>

#include "error.hpp"
#include "layout.hpp"
#include "read_memory.hpp"

namespace dso {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kStride = kReadStride;
constexpr int64_t kLeast = 1 << 20;
constexpr int64_t kRoundBytes = 256 << 20;  // minimum bytes per round, so that its start and end do not count
constexpr int kLeastRounds = 4;

// Writes memory that was just allocated, so that its pages exist; each thread writes what it will read.
class FirstTouch final : public Job {
 public:
  explicit FirstTouch(std::vector<MemoryRegion> shares) : shares_(std::move(shares)) {}
  int64_t next() override { return std::exchange(done_, true) ? -1 : int64_t(shares_.size()); }
  void task(int64_t index, int) override {
    std::memset(const_cast<uint8_t*>(shares_[size_t(index)].data), 1, size_t(shares_[size_t(index)].bytes));
  }

 private:
  const std::vector<MemoryRegion> shares_;
  bool done_ = false;
};

// Every stage is a round: each thread reads its share, the regions from first_[thread] to first_[thread + 1].
class Reading final : public Job {
 public:
  Reading(const std::vector<MemoryRegion>& regions, int threads, double seconds) : threads_(threads), seconds_(seconds) {
    int64_t total = 0;
    for (const MemoryRegion& region : regions) total += region.bytes;
    const int64_t share = round_up(ceil_div(total, threads), kStride);
    int64_t room = share;  // of the thread whose share is being filled
    first_.push_back(0);
    for (MemoryRegion rest : regions)
      while (rest.bytes > 0) {
        if (room == 0) {
          first_.push_back(parts_.size());
          room = share;
        }
        const int64_t taken = std::min(rest.bytes, room);
        parts_.push_back({rest.data, taken / kStride * kStride});
        bytes_ += parts_.back().bytes;
        rest = {rest.data + taken, rest.bytes - taken};
        room -= taken;
      }
    first_.resize(size_t(threads) + 1, parts_.size());
    passes_ = ceil_div(kRoundBytes, std::max<int64_t>(bytes_, kStride));
  }

  int64_t next() override {
    const Clock::time_point now = Clock::now();
    const auto since = [&](Clock::time_point t) { return std::chrono::duration<double>(now - t).count(); };
    if (rounds_ == 0) begun_ = now;
    if (rounds_ > 0) best_ = std::min(best_, since(round_));
    if (rounds_ >= kLeastRounds && since(begun_) >= seconds_) return -1;
    ++rounds_;
    round_ = now;
    return threads_;
  }

  void task(int64_t index, int) override {
    int64_t sum = 0;
    for (int64_t pass = 0; pass < passes_; ++pass)
      for (size_t i = first_[size_t(index)]; i < first_[size_t(index) + 1]; ++i) {
        const uint8_t* again = parts_[i].data;
        asm volatile("" : "+r"(again));  // otherwise the compiler could merge passes
        sum ^= read_(again, again + parts_[i].bytes);
      }
    sink_.fetch_xor(sum, std::memory_order_relaxed);
  }

  double bytes_a_second() const { return double(bytes_) * double(passes_) / best_; }

 private:
  const int threads_;
  const double seconds_;
  const ReadMemory read_ = widest_reads();
  std::vector<MemoryRegion> parts_;
  std::vector<size_t> first_;
  int64_t bytes_ = 0, passes_ = 1;
  int rounds_ = 0;
  Clock::time_point begun_, round_;
  double best_ = 1e300;
  std::atomic<int64_t> sink_{0};
};

void check_request(int64_t bytes, double seconds) {
  if (bytes < kLeast) fail(DSO_EINVAL, "bytes is %lld, must be at least %lld", (long long)bytes, (long long)kLeast);
  if (!(seconds >= 0 && seconds <= 3600)) fail(DSO_EINVAL, "seconds is %g, must be from 0 to 3600", seconds);
}

double run(Context& c, const std::vector<MemoryRegion>& regions, double seconds, ThreadPool::Lease& lease) {
  Reading reading(regions, c.pool.threads(), seconds);
  lease.team().run(reading);
  return reading.bytes_a_second();
}

}  // namespace

double read_bandwidth(Context& c, int64_t bytes, double seconds) {
  check_request(bytes, seconds);
  ThreadPool::Lease lease(c.pool);
  const Arena memory(bytes);
  const int64_t share = bytes / c.pool.threads() / kStride * kStride;
  std::vector<MemoryRegion> shares;
  for (int i = 0; i < c.pool.threads(); ++i) shares.push_back({memory.data() + i * share, share});
  FirstTouch touch(shares);
  lease.team().run(touch);
  return run(c, shares, seconds, lease);
}

double read_bandwidth(Context& c, const std::vector<MemoryRegion>& regions, double seconds) {
  int64_t bytes = 0;
  for (const MemoryRegion& region : regions) {
    if (!region.data || region.bytes < 0)
      fail(DSO_EINVAL, "a region is at %p and has %lld bytes", static_cast<const void*>(region.data), (long long)region.bytes);
    bytes += region.bytes;
  }
  check_request(bytes, seconds);
  ThreadPool::Lease lease(c.pool);
  return run(c, regions, seconds, lease);
}

}  // namespace dso
