#include "node_memory.hpp"

#include <algorithm>
#include <utility>

#include "layout.hpp"
#include "mapped_files.hpp"
#include "memory.hpp"

namespace dso {
namespace {

constexpr int64_t kPartBytes = 16 << 20;  // of a task, so that the threads of a node finish together

class Placing final : public Job {
 public:
  Placing(const ThreadPlaces& places, NodeMemory& memory, const std::vector<NodeRange>& ranges, bool copies)
      : places_(places), memory_(memory), copies_(copies) {
    for (int i = 0; i < places.nodes_count(); ++i) {
      for (const NodeRange& r : ranges)
        if (r.node == i) add(r);
      ends_.push_back(int64_t(parts_.size()));
    }
  }
  int64_t next() override { return std::exchange(done_, true) ? -1 : int64_t(parts_.size()); }
  int64_t node_end(int node) const override { return ends_[size_t(node)]; }
  void task(int64_t index, int) override {
    const NodeRange& r = parts_[size_t(index)];
    const int32_t node = places_.nodes[size_t(r.node)].node;
    Placement placed;
    if (copies_ && mapping_of(r.begin) && memory_.copy(r.begin, r.bytes, node)) placed.copied = r.bytes / page_bytes();
    for (int64_t at = 0; at < r.bytes; at += page_bytes()) {
      [[maybe_unused]] const volatile uint8_t touched = r.begin[at];
    }
    placed.pages = memory_.move(r.begin, r.bytes, node);
    std::lock_guard lock(mutex_);
    result_.copied += placed.copied;
    result_.pages.there += placed.pages.there;
    result_.pages.moved += placed.pages.moved;
    result_.pages.stayed += placed.pages.stayed;
  }
  const Placement& result() const { return result_; }

 private:
  void add(const NodeRange& r) {
    const auto up = [](const uint8_t* p) {
      return reinterpret_cast<const uint8_t*>(round_up(int64_t(reinterpret_cast<uintptr_t>(p)), page_bytes()));
    };
    for (const uint8_t *at = up(r.begin), *end = up(r.begin + r.bytes); at < end; at += kPartBytes)
      parts_.push_back({at, std::min<int64_t>(kPartBytes, end - at), r.node});
  }

  const ThreadPlaces& places_;
  NodeMemory& memory_;
  const bool copies_;
  std::vector<NodeRange> parts_;
  std::vector<int64_t> ends_;
  bool done_ = false;
  std::mutex mutex_;
  Placement result_;
};

}  // namespace

PageCounts RecordedMemory::move(const uint8_t* begin, int64_t bytes, int32_t node) {
  PageCounts counts;
  std::lock_guard lock(mutex_);
  for (int64_t at = 0; at < bytes; at += page_bytes()) {
    const auto [place, fresh] = nodes_.emplace(reinterpret_cast<uintptr_t>(begin + at), node);
    ++(!fresh && place->second == node ? counts.there : counts.moved);
    place->second = node;
  }
  return counts;
}

bool RecordedMemory::copy(const uint8_t* begin, int64_t bytes, int32_t node) {
  move(begin, bytes, node);
  return true;
}

int32_t RecordedMemory::node_of(const void* address) const {
  std::lock_guard lock(mutex_);
  const auto found = nodes_.find(reinterpret_cast<uintptr_t>(address) / uintptr_t(page_bytes()) * uintptr_t(page_bytes()));
  return found == nodes_.end() ? -1 : found->second;
}

Placement place_pages(Team& team, const ThreadPlaces& places, NodeMemory& memory, std::vector<NodeRange> ranges, bool copies) {
  std::stable_sort(ranges.begin(), ranges.end(), [](const NodeRange& a, const NodeRange& b) { return a.begin < b.begin; });
  Placing job(places, memory, ranges, copies);
  team.run(job);
  return job.result();
}

}  // namespace dso
