#include "../avx512/bit_lanes.hpp"
#ifdef __AMX_TILE__
#include "tile.hpp"
#else
#include "tile_emulated.hpp"
#endif
#include "train_tiles.hpp"
#define DSO_TRAIN_ENGINE TileUnits
#include "../generic/train_product.inl"
