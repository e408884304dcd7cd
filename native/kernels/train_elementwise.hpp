// What a kernel set offers training: row-wise ops, the loss and the optimizer. As kernels.hpp: plain types only, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dso {

struct TrainElementwise {};

}  // namespace dso
