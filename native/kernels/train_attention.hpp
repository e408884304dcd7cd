// What a kernel set offers training: attention. As kernels.hpp: plain types only, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dso {

struct TrainAttention {};

}  // namespace dso
