// What a kernel set offers training: row-wise ops, the loss and the optimizer. As kernels.hpp: plain types only, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dso_train.h"

namespace dso {

struct TrainElementwise {
  // ---- the optimizer: elements [begin, end) of a tensor; begin is a multiple of 256, end too, or the tensor's last
  void (*adamw)(const dso_train_update& update, int64_t begin, int64_t end);
  void (*squares)(int32_t type, const void* x, int64_t begin, int64_t end, double* sum, int64_t* not_finite);
};

}  // namespace dso
