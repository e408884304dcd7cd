#include "../avx512/lanes.hpp"
#ifdef __AMX_BF16__
#include "tile.hpp"
#else
#include "tile_emulated.hpp"
#endif
#define DSO_TILES
#include "../generic/train_attention.inl"
