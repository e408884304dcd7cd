// Assembles each variant's kernels: its own where its flags change the code, and otherwise those of the variant it extends.
// This file is compiled for any x86-64: code compiled for a variant may run only where the variant does. CMakeLists.txt defines
// DSO_WITHOUT_<VARIANT> for variants that the compiler could not build.
#include <algorithm>

#include "kernels.hpp"

namespace dso {
namespace {

// `base` with a variant's own products; the larger scratch serves both.
[[maybe_unused]] Kernels extended(const Kernels& base, const char* isa, const LinearKernels& linear) {
  Kernels kernels = base;
  kernels.isa = isa;
  kernels.linear = linear.linear;
  kernels.linear_scratch = std::max(base.linear_scratch, linear.linear_scratch);
  return kernels;
}
[[maybe_unused]] Kernels extended(const Kernels& base, const char* isa, const LinearKernels& linear,
                                  const TrainProduct* product, const TrainAttention* attention) {
  Kernels kernels = extended(base, isa, linear);
  kernels.train_product = product;
  kernels.train_attention = attention;
  return kernels;
}

}  // namespace

// Tables of kernels/<isa>/*.cpp, each in its variant's namespace.
#define DSO_TILE_KERNELS                     \
  extern const LinearKernels linear_kernels; \
  extern const TrainProduct train_product;   \
  extern const TrainAttention train_attention;
#define DSO_VECTOR_KERNELS                         \
  DSO_TILE_KERNELS                                 \
  extern const AttentionKernels attention_kernels; \
  extern const RowKernels row_kernels;             \
  extern const TrainElementwise train_elementwise;

#ifdef DSO_WITHOUT_AVX2
const Kernels* kernels_avx2() { return nullptr; }
#else
namespace avx2 {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_avx2() {
  using namespace avx2;
  static const Kernels kernels = {linear_kernels, attention_kernels,  row_kernels,     "avx2",
                                  &train_product, &train_elementwise, &train_attention};
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AVX2_VNNI
const Kernels* kernels_avx2_vnni() { return nullptr; }
#else
namespace avx2_vnni {
extern const LinearKernels linear_kernels;
}
const Kernels* kernels_avx2_vnni() {
  static const Kernels kernels = extended(*kernels_avx2(), "avx2-vnni", avx2_vnni::linear_kernels);
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AVX512
const Kernels* kernels_avx512() { return nullptr; }
#else
namespace avx512 {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_avx512() {
  using namespace avx512;
  static const Kernels kernels = {linear_kernels, attention_kernels,  row_kernels,     "avx512",
                                  &train_product, &train_elementwise, &train_attention};
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AVX512_VNNI
const Kernels* kernels_avx512_vnni() { return nullptr; }
#else
namespace avx512_vnni {
extern const LinearKernels linear_kernels;
}
const Kernels* kernels_avx512_vnni() {
  static const Kernels kernels = extended(*kernels_avx512(), "avx512-vnni", avx512_vnni::linear_kernels);
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AVX512_BF16
const Kernels* kernels_avx512_bf16() { return nullptr; }
#else
namespace avx512_bf16 {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_avx512_bf16() {
  using namespace avx512_bf16;
  static const Kernels kernels = {linear_kernels, attention_kernels,  row_kernels,     "avx512-bf16",
                                  &train_product, &train_elementwise, &train_attention};
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AMX
const Kernels* kernels_amx() { return nullptr; }
#else
namespace amx {
DSO_TILE_KERNELS
}
const Kernels* kernels_amx() {
  using namespace amx;
  static const Kernels kernels = extended(*kernels_avx512_bf16(), "amx", linear_kernels, &train_product, &train_attention);
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_AMX_EMULATED
const Kernels* kernels_amx_emulated() { return nullptr; }
#else
namespace amx_emulated {
DSO_TILE_KERNELS
}
const Kernels* kernels_amx_emulated() {
  using namespace amx_emulated;
  static const Kernels kernels =
      extended(*kernels_avx512_bf16(), "amx-emulated", linear_kernels, &train_product, &train_attention);
  return &kernels;
}
#endif

}  // namespace dso
