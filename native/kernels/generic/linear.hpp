// Entry point of matrix products: selects the integer, FP8 or float kernels by weight format.
#pragma once
#include "linear_float.hpp"
#include "linear_fp8.hpp"
#include "linear_int.hpp"

namespace dso::DSO_ISA_NAMESPACE {

static void linear(const Matrix& w, const float* bias, int32_t kind, const uint8_t* x, int64_t x_stride, int64_t T,
                   bool prefill, int64_t tile_begin, int64_t tile_end, float* y, int64_t y_stride, uint8_t* scratch) {
  if (kind == DSO_SLOT_Q8) return linear_int<DSO_SLOT_Q8>(w, bias, x, x_stride, T, tile_begin, tile_end, y, y_stride);
  if (kind == DSO_SLOT_Q16) return linear_int<DSO_SLOT_Q16>(w, bias, x, x_stride, T, tile_begin, tile_end, y, y_stride);
  if (w.format == DSO_FP8) return linear_fp8(w, bias, x, x_stride, T, tile_begin, tile_end, y, y_stride, scratch);
  linear_float(w, bias, kind, x, x_stride, T, prefill, tile_begin, tile_end, y, y_stride, scratch);
}

constexpr size_t linear_scratch_bytes =
    linear_float_scratch_bytes > linear_fp8_scratch_bytes ? linear_float_scratch_bytes : linear_fp8_scratch_bytes;
}  // namespace dso::DSO_ISA_NAMESPACE
