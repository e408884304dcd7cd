// Work outside a plan, split over a context's threads: packing, unpacking, one conversion, one product.
#pragma once
#include "context.hpp"
#include "dso.h"

namespace dso {

void pack(Context& c, int32_t format, int32_t source_type, const void* source, int64_t rows, int64_t cols, int64_t stride,
          const float* importance, void* packed);
void pack_fp8(Context& c, const uint8_t* codes, const float* scales, int64_t rows, int64_t cols, int64_t stride, void* packed);
void unpack(Context& c, const dso_weight& w, int64_t row_begin, int64_t row_end, float* out);
void norm(Context& c, const float* x, int64_t T, int64_t width, const float* weight, const float* bias, float eps, float* y);

// Layer norm of a row, or RMS norm without a bias.
void norm_row(const Kernels& k, const float* x, const float* weight, const float* bias, int64_t width, float eps, float* y);

constexpr int64_t kConvertedRows = 8;  // rows per conversion task
// Task `block` of the conversion of x[T, width] to rows `stride` bytes apart.
void convert_block(const Kernels& k, int32_t kind, const float* x, int64_t T, int64_t width, uint8_t* rows, int64_t stride,
                   int64_t block);
void convert(Context& c, int32_t slot_kind, const float* x, int64_t T, int64_t width, void* rows);
// Of x, or of `converted` rows.
void linear(Context& c, const dso_weight& w, const float* bias, int32_t activation, const float* x, const void* converted,
            int64_t T, int64_t decode_rows, float* y);

}  // namespace dso
