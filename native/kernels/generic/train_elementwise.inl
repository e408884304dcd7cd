// Defines this variant's TrainElementwise; included once, after its lanes. As in linear.inl: nothing from the standard library
// that emits code.
#include "../train_elementwise.hpp"
#include "math.hpp"
// After math.hpp, whose names they use.
#include "train_numbers.hpp"

#include "train_adamw.hpp"
#include "train_cross_entropy.hpp"
#include "train_rows.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainElementwise train_elementwise;  // `extern`, because a const object would otherwise be local to this unit
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
