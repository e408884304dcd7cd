// What variants_<processor>.cpp share: they assemble each variant's kernels, its own where its flags change the code, and
// otherwise those of the variant it extends. These files are compiled for any CPU of the processor: code compiled for a variant
// may run only where the variant does. CMakeLists.txt defines DSO_WITHOUT_<VARIANT> for variants that the compiler could not
// build.
#pragma once
#include <algorithm>

#include "kernels.hpp"

namespace dso {

// `base` with a variant's own products; the larger scratch serves both.
inline Kernels extended(const Kernels& base, const char* isa, const LinearKernels& linear) {
  Kernels kernels = base;
  kernels.isa = isa;
  kernels.linear = linear.linear;
  kernels.linear_scratch = std::max(base.linear_scratch, linear.linear_scratch);
  return kernels;
}
inline Kernels extended(const Kernels& base, const char* isa, const LinearKernels& linear, const LatentKernels& latent,
                        const TrainProduct* product, const TrainAttention* attention) {
  Kernels kernels = extended(base, isa, linear);
  static_cast<LatentKernels&>(kernels) = latent;
  kernels.train_product = product;
  kernels.train_attention = attention;
  return kernels;
}

}  // namespace dso

// Tables of kernels/<isa>/*.cpp, each in its variant's namespace.
#define DSO_TILE_KERNELS                     \
  extern const LinearKernels linear_kernels; \
  extern const LatentKernels latent_kernels; \
  extern const TrainProduct train_product;   \
  extern const TrainAttention train_attention;
#define DSO_VECTOR_KERNELS                         \
  DSO_TILE_KERNELS                                 \
  extern const AttentionKernels attention_kernels; \
  extern const RowKernels row_kernels;             \
  extern const TrainElementwise train_elementwise;
