// Defines this variant's LinearKernels; included once, after its lanes. Nothing from the standard library that emits code: the
// linker could keep an inline function compiled for this ISA as the copy that all code uses.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp, whose names they use.
#include "convert.hpp"
#include "linear.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const LinearKernels linear_kernels;  // `extern`, because a const object would otherwise be local to this unit
const LinearKernels linear_kernels = {.linear = linear, .linear_scratch = linear_scratch_bytes};
}  // namespace dso::DSO_ISA_NAMESPACE
