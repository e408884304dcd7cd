#define DSO_ISA_NAME "amx"
#define DSO_LINEAR linear_amx
#define DSO_LINEAR_SCRATCH linear_amx_scratch_bytes
#include "../avx512/lanes.hpp"
#include "tile.hpp"
#include "linear_amx.hpp"
#include "../generic/table.inl"
