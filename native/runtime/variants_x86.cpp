// The variants of x86-64, see variants.hpp.
#include "cpu_features.hpp"
#include "isa.hpp"
#include "variants.hpp"

namespace dso {

#ifdef DSO_WITHOUT_AVX2
const Kernels* kernels_avx2() { return nullptr; }
#else
namespace avx2 {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_avx2() {
  using namespace avx2;
  static const Kernels kernels = {linear_kernels, attention_kernels, latent_kernels,     row_kernels,
                                  "avx2",         &train_product,    &train_elementwise, &train_attention};
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
  static const Kernels kernels = {linear_kernels, attention_kernels, latent_kernels,     row_kernels,
                                  "avx512",       &train_product,    &train_elementwise, &train_attention};
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
  static const Kernels kernels = {linear_kernels, attention_kernels, latent_kernels,     row_kernels,
                                  "avx512-bf16",  &train_product,    &train_elementwise, &train_attention};
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
  static const Kernels kernels =
      extended(*kernels_avx512_bf16(), "amx", linear_kernels, latent_kernels, &train_product, &train_attention);
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
      extended(*kernels_avx512_bf16(), "amx-emulated", linear_kernels, latent_kernels, &train_product, &train_attention);
  return &kernels;
}
#endif

namespace {

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma | kF16c | kBmi2;
constexpr uint32_t kNeedsAvx512 = kNeedsAvx2 | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl;
constexpr uint32_t kNeedsAvx512Bf16 = kNeedsAvx512 | kAvx512Vnni | kAvx512Bf16;
constexpr uint32_t kNeedsAmx = kNeedsAvx512Bf16 | kAmxTile | kAmxInt8 | kAmxBf16;

}  // namespace

std::span<const Isa> isas() {
  static constexpr Isa list[] = {
      {"avx2", kNeedsAvx2, kernels_avx2, true},
      {"avx2-vnni", kNeedsAvx2 | kAvxVnni, kernels_avx2_vnni, true},
      {"avx512", kNeedsAvx512, kernels_avx512, true},
      {"avx512-vnni", kNeedsAvx512 | kAvx512Vnni, kernels_avx512_vnni, true},
      {"avx512-bf16", kNeedsAvx512Bf16, kernels_avx512_bf16, true},
      {"amx", kNeedsAmx, kernels_amx, true},
      {"amx-emulated", kNeedsAvx512Bf16, kernels_amx_emulated, false},
  };
  return list;
}

}  // namespace dso
