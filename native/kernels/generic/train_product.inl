// Fills this variant's TrainProduct; included once, behind its lanes. As table.inl: nothing of the standard library that emits code.
#include "../train_product.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainProduct train_product;  // without this, a const object would be of this unit alone
const TrainProduct train_product = {};
}  // namespace dso::DSO_ISA_NAMESPACE
