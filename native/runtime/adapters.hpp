// The low-rank adapters that a batch may use: for each slot and site the matrices A and B, which the caller owns.
#pragma once
#include <cstdint>
#include <vector>

#include "dso.h"
#include "kernels.hpp"

struct dso_adapters {
  struct Pair {
    dso::LowRank down{}, up{};  // A [rank, cols] and B [rows, rank]; rows of A 0: the adapter has nothing for the site
  };

  dso_adapters(const dso_adapter_site* sites, int32_t n, int32_t slots, int32_t max_rank);

  void set(int32_t slot, int32_t site, const dso_weight* down, const dso_weight* up);
  const Pair& pair(int64_t slot, int64_t site) const { return pairs_[size_t(slot) * sites.size() + size_t(site)]; }

  std::vector<dso_adapter_site> sites;
  const int32_t slots, max_rank;

 private:
  std::vector<Pair> pairs_;  // [slots][sites]
};
