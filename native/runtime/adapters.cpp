#include "adapters.hpp"

#include "error.hpp"
#include "layout.hpp"

using namespace dso;

namespace {

constexpr int32_t kMostSites = 1 << 20, kMostSlots = 1 << 12, kMostRank = 1 << 12, kMostSize = 1 << 24;

int32_t checked(const char* what, int32_t value, int32_t most) {
  if (value < 1 || value > most) fail(DSO_EINVAL, "adapters: %s is %d, must be from 1 to %d", what, value, most);
  return value;
}

LowRank checked(const char* what, const dso_weight& w, int32_t rows, int32_t cols) {
  if (w.format != DSO_F32 && w.format != DSO_BF16)
    fail(DSO_EINVAL, "adapters: %s has format %d, must be F32 or BF16", what, w.format);
  if (w.rows != rows || w.cols != cols || w.count > 1)
    fail(DSO_EINVAL, "adapters: %s is [%d, %d], must be one matrix [%d, %d]", what, w.rows, w.cols, rows, cols);
  const int64_t bytes = round_up(rows, kTileRows) * cols * (w.format == DSO_F32 ? 4 : 2);
  if (!w.data || w.bytes != bytes)
    fail(DSO_EINVAL, "adapters: %s has %lld bytes, must have %lld, or its data is NULL", what, (long long)w.bytes,
         (long long)bytes);
  return {w.format, rows, cols, static_cast<const uint8_t*>(w.data)};
}

}  // namespace

dso_adapters::dso_adapters(const dso_adapter_site* given, int32_t n, int32_t n_slots, int32_t rank)
    : slots(checked("slots", n_slots, kMostSlots)), max_rank(checked("max_rank", rank, kMostRank)) {
  if (checked("n", n, kMostSites) && !given) fail(DSO_EINVAL, "adapters: sites is NULL");
  sites.assign(given, given + n);
  for (const dso_adapter_site& s : sites) {
    checked("rows of a site", s.rows, kMostSize);
    checked("cols of a site", s.cols, kMostSize);
  }
  pairs_.resize(size_t(slots) * sites.size());
}

void dso_adapters::set(int32_t slot, int32_t site, const dso_weight* down, const dso_weight* up) {
  if (slot < 0 || slot >= slots) fail(DSO_EINVAL, "adapters: slot is %d, but there are %d", slot, slots);
  if (site < 0 || size_t(site) >= sites.size())
    fail(DSO_EINVAL, "adapters: site is %d, but there are %d", site, int(sites.size()));
  if (!down != !up) fail(DSO_EINVAL, "adapters: only one of the two matrices is NULL");
  Pair pair;
  if (down) {
    const int32_t rank = checked("the rank", down->rows, max_rank);
    pair.down = checked("A", *down, rank, sites[size_t(site)].cols);
    pair.up = checked("B", *up, sites[size_t(site)].rows, rank);
  }
  pairs_[size_t(slot) * sites.size() + size_t(site)] = pair;
}
