// The element-wise ops of plans: a row function and an entry in the table. Nothing else in native code refers to such an op
// except its number in dso.h. All operands are F32 rows of one width; the runtime converts if the output is of another kind.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

static void add_row(const float* a, const float* b, int64_t n, float, float* out) { add(a, b, n, out); }
static void swiglu_row(const float* a, const float* b, int64_t n, float, float* out) { swiglu(a, b, n, out); }
static void clamped_swiglu_row(const float* a, const float* b, int64_t n, float limit, float* out) {
  clamped_swiglu(a, b, n, 1.0f, limit, 0.0f, out);
}
static void geglu_row(const float* a, const float* b, int64_t n, float, float* out) { geglu(a, b, n, out); }
static void multiply_row(const float* a, const float* b, int64_t n, float, float* out) { multiply(a, b, n, out); }
static void gelu_row(const float* a, const float*, int64_t n, float, float* out) {
  each(a, n, out, [](F x) { return gelu(x); });
}
static void gelu_erf_row(const float* a, const float*, int64_t n, float, float* out) {
  each(a, n, out, [](F x) { return gelu_erf(x); });
}
static void relu_row(const float* a, const float*, int64_t n, float, float* out) {
  each(a, n, out, [](F x) { return max(zero(), x); });  // a NaN stays one
}
static void scale_row(const float* a, const float*, int64_t n, float factor, float* out) { scale(a, factor, n, out); }
static void softcap_row(const float* a, const float*, int64_t n, float scale, float* out) {
  each(a, n, out, [=](F x) { return mul(set(scale), tanh(div(x, set(scale)))); });
}

static constexpr ElementwiseOp elementwise_ops[] = {
    {DSO_OP_ADD, "ADD", 2, add_row},
    {DSO_OP_SWIGLU, "SWIGLU", 2, swiglu_row},
    {DSO_OP_CLAMPED_SWIGLU, "CLAMPED_SWIGLU", 2, clamped_swiglu_row},
    {DSO_OP_GEGLU, "GEGLU", 2, geglu_row},
    {DSO_OP_GELU, "GELU", 1, gelu_row},
    {DSO_OP_GELU_ERF, "GELU_ERF", 1, gelu_erf_row},
    {DSO_OP_RELU, "RELU", 1, relu_row},
    {DSO_OP_SCALE, "SCALE", 1, scale_row},
    {DSO_OP_SOFTCAP, "SOFTCAP", 1, softcap_row},
    {DSO_OP_MULTIPLY, "MULTIPLY", 2, multiply_row},
};

}  // namespace dso::DSO_ISA_NAMESPACE
