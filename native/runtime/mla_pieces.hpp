// Which tokens rows of latent attention see, and how absorbed attention divides them into pieces.
//
// A piece lies within a chunk of 256 tokens counted from the start of the sequence. Rows with a window and sinks have the
// chunks of the sinks first, then those of the window, so a row sees consecutive tokens of each. Partial results of pieces are
// merged in two steps, in ascending order: those of a group of 32 chunks to one, then the groups. Group boundaries are fixed,
// separately for the sinks. A piece of which a row sees nothing does not change its bits, so these depend on the tokens it sees
// and not on other rows; and with a single group, both steps give the same as one.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "dso.h"
#include "kernels.hpp"
#include "layout.hpp"

namespace dso {

struct MlaPiece {
  int64_t first, tokens;  // tokens [first, first + tokens) of the sequence
  bool sinks;
};

struct MlaPieces {
  int64_t sinks;       // plus tokens [0, sinks)
  int64_t begin, end;  // tokens of the windows of all rows

  static constexpr int64_t kGroup = 32;

  int64_t tokens() const { return sinks + end - begin; }
  int64_t count() const { return sink_chunks() + ceil_div(end, attn_chunk) - first_chunk(); }
  MlaPiece at(int64_t i) const {
    const int64_t chunk = i < sink_chunks() ? i : first_chunk() + i - sink_chunks();
    const int64_t first = i < sink_chunks() ? chunk * attn_chunk : std::max(begin, chunk * attn_chunk);
    return {first, std::min((chunk + 1) * attn_chunk, i < sink_chunks() ? sinks : end) - first, i < sink_chunks()};
  }
  int64_t groups() const { return sink_groups() + ceil_div(end, kGroup * attn_chunk) - first_chunk() / kGroup; }
  int64_t group_begin(int64_t group) const {  // its first piece; for the one after the last: count()
    if (group < sink_groups()) return group * kGroup;
    const int64_t chunk = (group - sink_groups() + first_chunk() / kGroup) * kGroup;
    return std::min(sink_chunks() + std::max<int64_t>(0, chunk - first_chunk()), count());
  }
  // The parts of a chunk that the rows see, starting at block boundaries: of the sinks, and of the window; empty if they have
  // no tokens.
  std::array<MlaPiece, 2> blocks_of(int64_t chunk) const {
    const int64_t first = chunk * attn_chunk, last = first + attn_chunk;
    const int64_t to = std::min(sinks, last), from = std::max(begin / DSO_BLOCK_TOKENS * DSO_BLOCK_TOKENS, first),
                  until = std::min(end, last);
    if (to > first && from <= to) return {{{first, std::max(to, until) - first, false}, {}}};  // one range
    return {{{first, std::max<int64_t>(0, to - first), true}, {from, std::max<int64_t>(0, until - from), false}}};
  }
  int64_t in_group() const { return std::min(count(), kGroup); }  // maximum number of pieces per group

 private:
  int64_t sink_chunks() const { return ceil_div(sinks, attn_chunk); }
  int64_t sink_groups() const { return ceil_div(sink_chunks(), kGroup); }
  int64_t first_chunk() const { return begin / attn_chunk; }
};

// Of the tokens up to itself a row sees the last `window` and the first `sinks`; window 0: all.
struct MlaWindow {
  int64_t window = 0, sinks = 0;
  bool operator==(const MlaWindow&) const = default;

  // Whether the row that is token i of its sequence has hidden tokens between its sinks and its window.
  bool parted(int64_t i) const { return window > 0 && i + 1 - window > sinks; }
  int64_t begin(int64_t i) const { return parted(i) ? i + 1 - window : 0; }
  int64_t seen(int64_t i) const { return parted(i) ? window + sinks : i + 1; }  // number of visible tokens

  // For rows that are tokens [i0, i1):
  MlaPieces pieces(int64_t i0, int64_t i1) const { return {parted(i1 - 1) ? sinks : 0, begin(i0), i1}; }
  int64_t pairs(int64_t i0, int64_t i1) const {                                  // number of pairs of a row and a visible token
    const int64_t whole = window > 0 ? std::clamp(window + sinks, i0, i1) : i1;  // rows before it see all tokens
    return (i0 + 1 + whole) * (whole - i0) / 2 + (i1 - whole) * (window + sinks);
  }
  // Tokens of a piece that the row sees: [first, end), counted within the piece.
  std::pair<int64_t, int64_t> within(const MlaPiece& p, int64_t i) const {
    if (p.sinks) return {0, parted(i) ? p.tokens : 0};
    return {std::max<int64_t>(0, begin(i) - p.first), std::min(p.tokens, i + 1 - p.first)};
  }
};

}  // namespace dso
