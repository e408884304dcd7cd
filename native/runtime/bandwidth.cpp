#include "bandwidth.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu_features.hpp"
#include "error.hpp"
#include "layout.hpp"

namespace dso {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kStride = 512;  // bytes per iteration of the loop
constexpr int64_t kLeast = 1 << 20;
constexpr int64_t kRoundBytes = 256 << 20;  // minimum bytes per round, so that its start and end do not count
constexpr int kLeastRounds = 4;

typedef int64_t Bytes32 __attribute__((vector_size(32), may_alias));
typedef int64_t Bytes64 __attribute__((vector_size(64), may_alias));

// The widest loads of this CPU, whatever the context's ISA: narrow loads keep too few cache lines in flight to saturate the
// memory bus. One accumulator per load, so that no load waits for another. Always inlined: compiled for the ISA of its caller.
template <class Vector>
[[gnu::always_inline]] inline int64_t read(const uint8_t* begin, const uint8_t* end) {
  constexpr int64_t kLoads = 8;
  static_assert(kStride % (kLoads * sizeof(Vector)) == 0);
  Vector sum[kLoads] = {};
  for (const uint8_t* p = begin; p < end; p += kLoads * sizeof(Vector))
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLoads; ++i) sum[i] ^= reinterpret_cast<const Vector*>(p)[i];
#pragma GCC unroll 8
  for (int64_t i = 1; i < kLoads; ++i) sum[0] ^= sum[i];
  return sum[0][0];
}
[[gnu::target("avx512f")]] int64_t read_avx512(const uint8_t* begin, const uint8_t* end) { return read<Bytes64>(begin, end); }
[[gnu::target("avx2")]] int64_t read_avx2(const uint8_t* begin, const uint8_t* end) { return read<Bytes32>(begin, end); }

// The first stage writes the memory, one task per thread for its share; every later stage is a round of reading.
class Reading final : public Job {
 public:
  Reading(int64_t bytes, int threads, double seconds)
      : threads_(threads),
        share_(bytes / threads / kStride * kStride),
        passes_(ceil_div(kRoundBytes, bytes)),
        seconds_(seconds),
        memory_(bytes) {}

  int64_t next() override {
    const Clock::time_point now = Clock::now();
    const auto since = [&](Clock::time_point t) { return std::chrono::duration<double>(now - t).count(); };
    if (stage_ == 1) first_ = now;
    if (stage_ > 1) best_ = std::min(best_, since(round_));
    if (stage_ > kLeastRounds && since(first_) >= seconds_) return -1;
    ++stage_;
    round_ = now;
    return threads_;
  }

  void task(int64_t index, int) override {
    uint8_t* begin = memory_.data() + index * share_;
    if (stage_ == 1) {
      std::memset(begin, 1, share_);
      return;
    }
    int64_t sum = 0;
    for (int64_t pass = 0; pass < passes_; ++pass) {
      const uint8_t* again = begin;
      asm volatile("" : "+r"(again));  // otherwise the compiler could merge passes
      sum ^= read_(again, again + share_);
    }
    sink_.fetch_xor(sum, std::memory_order_relaxed);
  }

  double bytes_a_second() const { return double(share_) * threads_ * passes_ / best_; }

 private:
  const int threads_;
  const int64_t share_, passes_;
  const double seconds_;
  const Arena memory_;
  int64_t (*const read_)(const uint8_t*, const uint8_t*) = detect_features() & kAvx512f ? read_avx512 : read_avx2;
  int stage_ = 0;
  Clock::time_point first_, round_;
  double best_ = 1e300;
  std::atomic<int64_t> sink_{0};
};

}  // namespace

double read_bandwidth(Context& c, int64_t bytes, double seconds) {
  if (bytes < kLeast) fail(DSO_EINVAL, "bytes is %lld, must be at least %lld", (long long)bytes, (long long)kLeast);
  if (!(seconds >= 0 && seconds <= 3600)) fail(DSO_EINVAL, "seconds is %g, must be from 0 to 3600", seconds);
  ThreadPool::Lease lease(c.pool);
  Reading reading(bytes, c.pool.threads(), seconds);
  lease.team().run(reading);
  return reading.bytes_a_second();
}

}  // namespace dso
