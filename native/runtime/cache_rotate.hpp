// Rotates cached keys to other positions: used for the tokens after a gap when a window drops tokens.
#pragma once
#include "cache.hpp"
#include "context.hpp"

namespace dso {

// See dso_cache_rotate.
void turn(Context& c, dso_cache& cache, const dso_rotation& key, const dso_rotation* index, int32_t group, const int32_t* table,
          int64_t tokens, int64_t position, int64_t delta);

}  // namespace dso
