// The variants of aarch64, see variants.hpp.
#include "cpu_features.hpp"
#include "isa.hpp"
#include "variants.hpp"

namespace dso {

#ifdef DSO_WITHOUT_NEON
const Kernels* kernels_neon() { return nullptr; }
#else
namespace neon {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_neon() {
  using namespace neon;
  static const Kernels kernels = {linear_kernels, attention_kernels, latent_kernels,     row_kernels,
                                  "neon",         &train_product,    &train_elementwise, &train_attention};
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_NEON_DOTPROD
const Kernels* kernels_neon_dotprod() { return nullptr; }
#else
namespace neon_dotprod {
extern const LinearKernels linear_kernels;
}
const Kernels* kernels_neon_dotprod() {
  static const Kernels kernels = extended(*kernels_neon(), "neon-dotprod", neon_dotprod::linear_kernels);
  return &kernels;
}
#endif

#ifdef DSO_WITHOUT_NEON_I8MM
const Kernels* kernels_neon_i8mm() { return nullptr; }
#else
namespace neon_i8mm {
DSO_VECTOR_KERNELS
}
const Kernels* kernels_neon_i8mm() {
  using namespace neon_i8mm;
  static const Kernels kernels = {linear_kernels, attention_kernels, latent_kernels,     row_kernels,
                                  "neon-i8mm",    &train_product,    &train_elementwise, &train_attention};
  return &kernels;
}
#endif

std::span<const Isa> isas() {
  static constexpr Isa list[] = {
      {"neon", kAsimd, kernels_neon, true},
      {"neon-dotprod", kAsimd | kDotProd, kernels_neon_dotprod, true},
      {"neon-i8mm", kAsimd | kDotProd | kI8mm | kArmBf16, kernels_neon_i8mm, true},
  };
  return list;
}

}  // namespace dso
