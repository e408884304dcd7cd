// Defines the LinearKernels of a variant that differs from another, DSO_BASE, only in integer dot products; included once,
// after its lanes. As in linear.inl: nothing from the standard library that emits code.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp, whose names they use.
#include "convert.hpp"
#include "linear_int.hpp"

namespace dso::DSO_BASE {
extern const LinearKernels linear_kernels;
}

namespace dso::DSO_ISA_NAMESPACE {
static_assert(has_dot_int);

static void linear(const Matrix& w, const float* bias, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T,
                   bool prefill, int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch) {
  if (kind == DSO_SLOT_Q8) return linear_int<DSO_SLOT_Q8>(w, bias, x, x_stride, T, tile_begin, tile_end, y, y_stride);
  if (kind == DSO_SLOT_Q16) return linear_int<DSO_SLOT_Q16>(w, bias, x, x_stride, T, tile_begin, tile_end, y, y_stride);
  DSO_BASE::linear_kernels.linear(w, bias, kind, x, x_stride, T, prefill, tile_begin, tile_end, y, y_stride, scratch);
}

extern const LinearKernels linear_kernels;  // `extern`, because a const object would otherwise be local to this unit
const LinearKernels linear_kernels = {.linear = linear, .linear_scratch = 0};
}  // namespace dso::DSO_ISA_NAMESPACE
