// Where the cache holds the entries that several tokens share. See CachedRows in graph/ir.py.
#pragma once
#include <cstdint>

#include "dso.h"

namespace dso {

struct EntryPlaces {
  int64_t every;  // tokens that share an entry

  // The token in whose place an entry lies: one in the block of its last token.
  int64_t at(int64_t entry) const {
    const int64_t last = (entry + 1) * every - 1;
    return last / DSO_BLOCK_TOKENS * DSO_BLOCK_TOKENS + last % DSO_BLOCK_TOKENS / every;
  }
  // The first entry that does not follow this one in consecutive places.
  int64_t end_of_run(int64_t entry) const {
    if (every == 1) return INT64_MAX;
    return (((entry + 1) * every - 1) / DSO_BLOCK_TOKENS + 1) * DSO_BLOCK_TOKENS / every;
  }
};

}  // namespace dso
