// Which rows use which expert, and how that work is split. Built once for the steps over one slot of routes, as soon as the
// routes are known; EXPERTS_GATE_UP writes its rows in the order of the groups, and EXPERTS_DOWN reads them in that order.
//
// Grouped: the (token, choice) pairs are sorted by expert, tokens ascending, so that an expert's weights are read once for all
// its rows. Otherwise each pair is a group of its own, in the order of the tokens: the plain form. The form never changes a
// row's bits. The pairs of experts that another process has are left out.
#pragma once
#include <algorithm>
#include <vector>

#include "linear_grid.hpp"
#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

// The experts of a stack: [first, first + experts) of `all` that routes name.
struct OwnExperts {
  int64_t experts, top_k, first, all;
  bool operator==(const OwnExperts&) const = default;
};

struct ExpertGroup {  // pairs [begin, end) of one expert; those from `prefill` on belong to sequences in prefill phase
  int64_t expert, begin, prefill, end;
};

class ExpertGroups {
 public:
  ExpertGroups(int32_t routes, const OwnExperts& chosen, bool grouped) : routes(routes), chosen(chosen), grouped(grouped) {}

  void reserve(int64_t tokens);  // reserves room for this many, so that build() does not allocate
  // `decode`: number of leading tokens of sequences in decode phase. An invalid expert index counts as 0.
  void build(const Rows& routes, int64_t decode);

  const int32_t routes;  // the slot
  const OwnExperts chosen;
  const bool grouped;

  int64_t pairs() const { return int64_t(tokens_.size()); }
  const std::vector<ExpertGroup>& groups() const { return groups_; }
  // Accessors for pair `p`. Within a group tokens ascend; a token's pairs are in groups of ascending experts.
  const int32_t* tokens(int64_t p) const { return tokens_.data() + p; }
  float weight(int64_t p) const { return weights_[p]; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<ExpertGroup> groups_;
  std::vector<int64_t> places_;  // per expert: position of its next pair
};

// Calls body(begin, end, prefill) for the pairs [begin, end) of a group, separately for each kernel family.
template <class Body>
void by_family(const ExpertGroup& g, bool one_family, const Body& body) {
  const int64_t border = one_family && g.prefill < g.end ? g.begin : g.prefill;
  if (g.begin < border) body(g.begin, border, false);
  if (border < g.end) body(border, g.end, true);
}

// Splits `tiles` into `blocks` blocks whose sizes differ by at most one step.
struct TileBlocks {
  int64_t tiles = 0, step = 1, blocks = 1;

  static TileBlocks of(int64_t tiles, int64_t step, int64_t blocks) {
    return {tiles, step, std::clamp<int64_t>(blocks, 1, ceil_div(tiles, step))};
  }
  int64_t steps() const { return ceil_div(tiles, step); }
  int64_t first(int64_t block) const { return std::min(tiles, steps() * block / blocks * step); }
  int64_t largest() const { return std::min(tiles, ceil_div(steps(), blocks) * step); }
};

}  // namespace dso
