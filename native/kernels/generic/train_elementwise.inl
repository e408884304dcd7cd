// Fills this variant's TrainElementwise; included once, behind its lanes. As linear.inl: nothing of the standard library that
// emits code.
#include "../train_elementwise.hpp"
#include "math.hpp"
// After math.hpp: they use its names.
#include "train_numbers.hpp"

#include "train_adamw.hpp"
#include "train_cross_entropy.hpp"
#include "train_rows.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainElementwise train_elementwise;  // without this, a const object would be of this unit alone
const TrainElementwise train_elementwise = {
    .adamw = adamw,
    .squares = squares,
    .scale = scale_numbers,
    .rows_summed = rows_summed,
    .rms_norm = rms_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .swiglu = swiglu_forward,
    .swiglu_backward = swiglu_backward,
    .rope = rope_heads,
    .cross_entropy = cross_entropy,
};
}  // namespace dso::DSO_ISA_NAMESPACE
