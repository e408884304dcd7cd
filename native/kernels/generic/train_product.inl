// Defines this variant's TrainProduct; included once, after its lanes. A variant with its own matrix units defines
// DSO_TRAIN_ENGINE. As in linear.inl: nothing from the standard library that emits code.
#include "train_product.hpp"

#ifndef DSO_TRAIN_ENGINE
#define DSO_TRAIN_ENGINE Vectors
#endif

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainProduct train_product;  // `extern`, because a const object would otherwise be local to this unit
const TrainProduct train_product = {
    .block = product_block<DSO_TRAIN_ENGINE>,
    .scratch = product_scratch<DSO_TRAIN_ENGINE>,
    .column_sums = column_sums,
};
}  // namespace dso::DSO_ISA_NAMESPACE
