// Fills this variant's TrainAttention; included once, behind its lanes. As table.inl: nothing of the standard library that emits code.
#include "../train_attention.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainAttention train_attention;  // without this, a const object would be of this unit alone
const TrainAttention train_attention = {};
}  // namespace dso::DSO_ISA_NAMESPACE
