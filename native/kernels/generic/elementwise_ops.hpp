// The element-wise ops of plans: a row function and an entry in the table. Nothing else in native code refers to such an op
// except its number in dso.h. All operands are F32 rows of one width; the runtime converts if the output is of another kind.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

static constexpr ElementwiseOp elementwise_ops[] = {
    {DSO_OP_ADD, "ADD", 2, add},
    {DSO_OP_SWIGLU, "SWIGLU", 2, swiglu},
    {DSO_OP_MULTIPLY, "MULTIPLY", 2, multiply},
    {DSO_OP_SIGMOID_GATE, "SIGMOID_GATE", 2, sigmoid_gate},
};

}  // namespace dso::DSO_ISA_NAMESPACE
