// Defines the LinearKernels of a variant with tile registers; uses those of a vector variant, AVX-512 with BF16, where tiles do
// not help. As in generic/linear.inl: nothing from the standard library that emits code.
#include "../avx512/lanes.hpp"
#ifdef __AMX_TILE__
#include "tile.hpp"
#else
#include "tile_emulated.hpp"
#endif
#include "linear_amx.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const LinearKernels linear_kernels;  // `extern`, because a const object would otherwise be local to this unit
const LinearKernels linear_kernels = {.linear = linear_amx, .linear_scratch = sizeof(tiled::Scratch)};
}  // namespace dso::DSO_ISA_NAMESPACE
