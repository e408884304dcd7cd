#include "adapters.hpp"

#include <algorithm>

#include "error.hpp"
#include "layout.hpp"

using namespace dso;

namespace {

constexpr int32_t kMostSites = 1 << 20, kMostSlots = 1 << 12, kMostRank = 1 << 12, kMostSize = 1 << 24, kMostHeads = 1 << 12;

int32_t checked(const char* what, int32_t value, int32_t most) {
  if (value < 1 || value > most) fail(DSO_EINVAL, "adapters: %s is %d, must be from 1 to %d", what, value, most);
  return value;
}

int64_t low_rank_tile_bytes(int32_t format, int64_t cols) { return format == DSO_F32 ? cols * 64 : ceil_div(cols, 2) * 64; }

dso_adapters::Stack checked(const char* what, const dso_weight& w, int32_t rows, int32_t cols, int32_t heads) {
  if (w.format != DSO_F32 && w.format != DSO_BF16)
    fail(DSO_EINVAL, "adapters: %s has format %d, must be F32 or BF16", what, w.format);
  const int32_t count = std::max(1, w.count);
  if (w.rows != rows || w.cols != cols || (count != 1 && count != heads))
    fail(DSO_EINVAL, "adapters: %s is %d of [%d, %d], must be one matrix [%d, %d], or one for each of %d heads", what, count,
         w.rows, w.cols, rows, cols, heads);
  const LowRank first{w.format, rows, cols, static_cast<const uint8_t*>(w.data), low_rank_tile_bytes(w.format, cols), nullptr};
  const int64_t bytes = ceil_div(rows, kTileRows) * first.tile_bytes;
  if (!w.data || w.bytes != bytes * count)
    fail(DSO_EINVAL, "adapters: %s has %lld bytes, must have %lld, or its data is NULL", what, (long long)w.bytes,
         (long long)(bytes * count));
  return {first, count > 1 ? bytes : 0};
}

}  // namespace

dso_adapters::dso_adapters(const dso_adapter_site* given, int32_t n, int32_t n_slots, int32_t rank)
    : slots(checked("slots", n_slots, kMostSlots)), max_rank(checked("max_rank", rank, kMostRank)) {
  if (checked("n", n, kMostSites) && !given) fail(DSO_EINVAL, "adapters: sites is NULL");
  sites.assign(given, given + n);
  for (const dso_adapter_site& s : sites) {
    checked("rows of a site", s.rows, kMostSize);
    checked("cols of a site", s.cols, kMostSize);
    checked("heads of a site", std::max(1, s.heads), kMostHeads);
  }
  pairs_.resize(size_t(slots) * sites.size());
  headed_.resize(size_t(slots));
}

void dso_adapters::set(int32_t slot, int32_t site, const dso_weight* down, const dso_weight* up) {
  if (slot < 0 || slot >= slots) fail(DSO_EINVAL, "adapters: slot is %d, but there are %d", slot, slots);
  if (site < 0 || size_t(site) >= sites.size())
    fail(DSO_EINVAL, "adapters: site is %d, but there are %d", site, int(sites.size()));
  if (!down != !up) fail(DSO_EINVAL, "adapters: only one of the two matrices is NULL");
  const dso_adapter_site& shape = sites[size_t(site)];
  const int32_t heads = std::max(1, shape.heads);
  Pair pair;
  if (down) {
    const int32_t rank = checked("the rank", down->rows, max_rank);
    pair.down = checked("A", *down, rank, shape.cols, heads);
    pair.up = checked("B", *up, shape.rows, rank, heads);
  }
  Pair& held = pairs_[size_t(slot) * sites.size() + size_t(site)];
  if (heads > 1) headed_[size_t(slot)] += int(down != nullptr) - int(held.down.first.rows > 0);
  held = pair;
}

namespace {

// Calls `use` with the matrix B of the tiles of a site, and the first and last + 1 row, of each adapter in rows [row, end).
template <class Use>
void for_adapted(const Run& run, int32_t site, int64_t row, int64_t end, int64_t tile, Use use) {
  const std::vector<AdaptedRows>& adapted = run.batch.adapted;
  auto at =
      std::partition_point(adapted.begin(), adapted.end(), [=](const AdaptedRows& a) { return a.first + a.count <= row; });
  for (; at != adapted.end() && at->first < end; ++at) {
    LowRank b = run.batch.source->adapters->pair(at->slot, site).up.first;
    if (b.rows == 0) continue;
    b.data += tile * b.tile_bytes;
    b.rows -= int32_t(tile * kTileRows);
    use(b, std::max(at->first, row), std::min(at->first + at->count, end));
  }
}

constexpr int64_t kMostFetched = 64 << 10;  // bytes

}  // namespace

void dso::add_low_rank(const Run& run, int32_t site, const SlotRef& h, int64_t row, int64_t end, int64_t tile, int64_t tile_end,
                       float* y, int64_t y_stride) {
  const Rows& rows = run.slots[h.index];
  for_adapted(run, site, row, end, tile, [&](const LowRank& b, int64_t first, int64_t last) {
    run.kernels.low_rank(b, h.kind, rows.row(first), rows.stride, last - first, 0, tile_end - tile, true,
                         reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(y) + (first - row) * y_stride), y_stride);
  });
}

dso::DownFetches::DownFetches(const Run& run, const std::vector<int32_t>& sites, int64_t part, int64_t parts) {
  const std::vector<AdaptedRows>& adapted = run.batch.adapted;
  for (int32_t site : sites)
    for (size_t i = 0; i < adapted.size() && count_ < fetches_.size(); ++i) {
      if (i > 0 && adapted[i].slot == adapted[i - 1].slot) continue;
      const LowRank& a = run.batch.source->adapters->pair(adapted[i].slot, site).down.first;
      const int64_t lines = ceil_div(a.rows, kTileRows) * a.tile_bytes / 64, begin = part * lines / parts;
      const int64_t end = (part + 1) * lines / parts;
      if (begin < end) fetches_[count_++] = {a.data + 64 * begin, 64 * (end - begin)};
    }
}

void dso::prefetch_low_rank(const Run& run, int32_t site, int64_t row, int64_t end, int64_t tile, int64_t tile_end) {
  int64_t left = kMostFetched;
  for_adapted(run, site, row, end, tile, [&](const LowRank& b, int64_t, int64_t) {
    const int64_t bytes = std::min(left, (tile_end - tile) * b.tile_bytes);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(b.data + at, 0, 2);
    left -= bytes;
  });
}
