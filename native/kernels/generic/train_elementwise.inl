// Fills this variant's TrainElementwise; included once, behind its lanes. As table.inl: nothing of the standard library that emits code.
#include "../train_elementwise.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainElementwise train_elementwise;  // without this, a const object would be of this unit alone
const TrainElementwise train_elementwise = {};
}  // namespace dso::DSO_ISA_NAMESPACE
