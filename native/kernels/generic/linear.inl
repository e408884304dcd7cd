// Fills this variant's LinearKernels; included once, behind its lanes. Nothing of the standard library that emits code: an
// inline function compiled for this ISA could be the copy that the linker keeps for all.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp: they use its names.
#include "convert.hpp"
#include "linear.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const LinearKernels linear_kernels;  // without this, a const object would be of this unit alone
const LinearKernels linear_kernels = {.linear = linear, .linear_scratch = linear_scratch_bytes};
}  // namespace dso::DSO_ISA_NAMESPACE
