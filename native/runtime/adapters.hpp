// The low-rank adapters that a batch may use: for each slot and site the matrices A and B, which the caller owns.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "dso.h"
#include "kernels.hpp"
#include "op.hpp"
#include "step_reader.hpp"

struct dso_adapters {
  // Heads share a matrix, or have one each.
  struct Stack {
    dso::LowRank first{};
    int64_t step = 0;  // bytes from the matrix of one head to the next
    dso::LowRank of(int64_t head) const {
      return {first.format, first.rows, first.cols, first.data + head * step, first.tile_bytes, nullptr};
    }
  };
  struct Pair {
    Stack down, up;  // A [rank, cols] and B [rows, rank]; rows of A 0: the adapter has nothing for the site
  };

  dso_adapters(const dso_adapter_site* sites, int32_t n, int32_t slots, int32_t max_rank);

  void set(int32_t slot, int32_t site, const dso_weight* down, const dso_weight* up);
  const Pair& pair(int64_t slot, int64_t site) const { return pairs_[size_t(slot) * sites.size() + size_t(site)]; }
  // Whether the slot's adapter has matrices for a site with heads.
  bool adapts_heads(int64_t slot) const { return headed_[size_t(slot)] > 0; }

  std::vector<dso_adapter_site> sites;
  const int32_t slots, max_rank;

 private:
  std::vector<Pair> pairs_;      // [slots][sites]
  std::vector<int32_t> headed_;  // [slots]: number of sites with heads that have matrices
};

namespace dso {

// The kind in which adapters read a product's rows, and of the result of LORA_DOWN: as precise as the rows, within bf16.
constexpr int32_t low_rank_kind(int32_t kind) {
  return kind == DSO_SLOT_Q8 || kind == DSO_SLOT_BF16 ? DSO_SLOT_BF16 : DSO_SLOT_F32;
}

// Adds the adapters' part of a product to rows [row, end), for outputs of tiles [tile, tile_end).
//
// h: the result of LORA_DOWN for the site. y: row `row` at the first output of `tile`.
void add_low_rank(const Run& run, int32_t site, const SlotRef& h, int64_t row, int64_t end, int64_t tile, int64_t tile_end,
                  float* y, int64_t y_stride);

// What one of `parts` equal parts of a product fetches of the matrices A that the LORA_DOWN steps after it read, whose sites
// these are. With a few rows for each adapter, reading A from memory takes longer than the products with it.
class DownFetches {
 public:
  DownFetches(const Run& run, const std::vector<int32_t>& sites, int64_t part, int64_t parts);
  Matrix beside(Matrix w) const {
    w.next = fetches_.data();
    w.next_end = fetches_.data() + count_;
    return w;
  }

 private:
  std::array<Fetch, 64> fetches_;
  size_t count_ = 0;
};

// Starts to fetch the matrices that `add_low_rank` will read, which other work has usually driven out of the caches.
void prefetch_low_rank(const Run& run, int32_t site, int64_t row, int64_t end, int64_t tile, int64_t tile_end);

}  // namespace dso
