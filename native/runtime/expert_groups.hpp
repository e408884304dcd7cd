// Which rows meet which expert's matrices, and how that work is cut. Made once for the steps over one slot of routes, when
// these are known; EXPERTS_GATE_UP writes its rows in the order of the groups, and EXPERTS_DOWN reads them so.
//
// Grouped: the (token, choice) pairs sorted by expert, tokens ascending, so that an expert's weights meet all their rows at
// once. Else each pair is a group by itself, in the order of the tokens: the plain form. Which it is never changes a row's
// bits.
#pragma once
#include <algorithm>
#include <vector>

#include "linear_grid.hpp"
#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

struct Group {  // pairs [begin, end): one expert's; those from `prefill` on belong to sequences in prefill phase
  int64_t expert, begin, prefill, end;
};

class ExpertGroups {
 public:
  ExpertGroups(int32_t routes, const Chosen& chosen, bool grouped) : routes(routes), chosen(chosen), grouped(grouped) {}

  void reserve(int64_t tokens);  // room for so many, so that build() takes no memory
  // `decode`: how many leading tokens belong to sequences in decode phase. A number that is no expert's counts as 0.
  void build(const Rows& routes, int64_t decode);

  const int32_t routes;  // the slot
  const Chosen chosen;
  const bool grouped;

  int64_t pairs() const { return int64_t(tokens_.size()); }
  const std::vector<Group>& groups() const { return groups_; }
  // Of pair `p`. Within a group tokens ascend; a token's pairs lie in groups of ascending experts.
  const int32_t* tokens(int64_t p) const { return tokens_.data() + p; }
  float weight(int64_t p) const { return weights_[p]; }

 private:
  std::vector<int32_t> tokens_;
  std::vector<float> weights_;
  std::vector<Group> groups_;
  std::vector<int64_t> places_;  // of each expert: where its next pair goes
};

// body(begin, end, prefill) for the pairs [begin, end) of a group, of each kernel family by itself.
template <class Body>
void by_family(const Group& g, bool one_family, const Body& body) {
  const int64_t border = one_family && g.prefill < g.end ? g.begin : g.prefill;
  if (g.begin < border) body(g.begin, border, false);
  if (border < g.end) body(border, g.end, true);
}

// `tiles` in `blocks` blocks that differ by one step at most.
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
