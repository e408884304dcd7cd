// The element-wise ops of plans: a function of rows and its line in the table. Nothing else in native code names such an op but
// its number in dso.h. All operands are F32 rows of one width; the output may be of any kind, which the runtime sees to.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

static constexpr ElementwiseOp elementwise_ops[] = {
    {DSO_OP_ADD, "ADD", 2, add},
    {DSO_OP_SWIGLU, "SWIGLU", 2, swiglu},
};

}  // namespace dso::DSO_ISA_NAMESPACE
