// Fills this variant's TrainProduct; included once, behind its lanes. A variant with matrix units of its own defines
// DSO_TRAIN_ENGINE. As linear.inl: nothing of the standard library that emits code.
#include "train_product.hpp"

#ifndef DSO_TRAIN_ENGINE
#define DSO_TRAIN_ENGINE Vectors
#endif

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainProduct train_product;  // without this, a const object would be of this unit alone
const TrainProduct train_product = {
    .block = product_block<DSO_TRAIN_ENGINE>,
    .scratch = product_scratch<DSO_TRAIN_ENGINE>,
    .column_sums = column_sums,
};
}  // namespace dso::DSO_ISA_NAMESPACE
