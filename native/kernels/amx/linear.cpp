// Fills the LinearKernels of a variant with tile registers: a vector variant's, AVX-512 with BF16, where tiles don't help. As
// generic/linear.inl: nothing of the standard library that emits code.
#include "../avx512/lanes.hpp"
#ifdef __AMX_TILE__
#include "tile.hpp"
#else
#include "tile_emulated.hpp"
#endif
#include "linear_amx.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const LinearKernels linear_kernels;  // without this, a const object would be of this unit alone
const LinearKernels linear_kernels = {.linear = linear_amx, .linear_scratch = sizeof(tiled::Scratch)};
}  // namespace dso::DSO_ISA_NAMESPACE
