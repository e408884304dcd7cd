// The lanes of each ISA and the functions on them against scalar code, and against each other. This file is compiled for any
// CPU of its processor; each ISA's checks are compiled for that ISA, and run if the machine supports it.
#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "check.hpp"
#include "exact_fma.hpp"
#include "target_isa.hpp"

#ifdef __x86_64__

DSO_BEGIN_TARGET("avx2,fma,f16c,bmi2")
#define DSO_ISA_NAMESPACE lanes_avx2
#include "../kernels/avx2/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef DSO_ISA_NAMESPACE
#undef DSO_AVX2_LANES_HPP
#undef DSO_MATH_HPP
DSO_END_TARGET

DSO_BEGIN_TARGET("avx2,fma,f16c,bmi2,avxvnni")
#define __AVXVNNI__ 1
#define DSO_ISA_NAMESPACE lanes_avx2_vnni
#include "../kernels/avx2/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef DSO_ISA_NAMESPACE
#undef DSO_MATH_HPP
#undef __AVXVNNI__
DSO_END_TARGET

DSO_BEGIN_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define DSO_ISA_NAMESPACE lanes_avx512
#include "../kernels/avx512/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef DSO_ISA_NAMESPACE
#undef DSO_AVX512_LANES_HPP
#undef DSO_MATH_HPP
DSO_END_TARGET

DSO_BEGIN_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#define DSO_ISA_NAMESPACE lanes_avx512_bf16
#include "../kernels/avx512/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef __AVX512BF16__
#undef __AVX512VNNI__
DSO_END_TARGET

#else
#define DSO_ISA_NAMESPACE lanes_neon
#include "../kernels/neon/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef DSO_ISA_NAMESPACE
#undef DSO_NEON_LANES_HPP
#undef DSO_MATH_HPP

DSO_BEGIN_TARGET("arch=armv8.2-a+dotprod")
#define __ARM_FEATURE_DOTPROD 1
#define DSO_ISA_NAMESPACE lanes_neon_dotprod
#include "../kernels/neon/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef DSO_ISA_NAMESPACE
#undef DSO_NEON_LANES_HPP
#undef DSO_MATH_HPP
#undef __ARM_FEATURE_DOTPROD
DSO_END_TARGET

DSO_BEGIN_TARGET("arch=armv8.2-a+dotprod+i8mm+bf16")
#define __ARM_FEATURE_DOTPROD 1
#define __ARM_FEATURE_MATMUL_INT8 1
#define __ARM_FEATURE_BF16_VECTOR_ARITHMETIC 1
#define DSO_ISA_NAMESPACE lanes_neon_i8mm
#include "../kernels/neon/lanes.hpp"
#include "../kernels/generic/math.hpp"
#include "lanes_checks.inl"
#undef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#undef __ARM_FEATURE_MATMUL_INT8
#undef __ARM_FEATURE_DOTPROD
DSO_END_TARGET
#endif

int main() {
  const struct {
    const char* isa;
    void (*run)(const char*, std::vector<uint32_t>&);
  } all[] = {
#ifdef __x86_64__
      {"avx2", lanes_avx2::check_lanes},
      {"avx2-vnni", lanes_avx2_vnni::check_lanes},
      {"avx512", lanes_avx512::check_lanes},
      {"avx512-bf16", lanes_avx512_bf16::check_lanes},
#else
      {"neon", lanes_neon::check_lanes},
      {"neon-dotprod", lanes_neon_dotprod::check_lanes},
      {"neon-i8mm", lanes_neon_i8mm::check_lanes},
#endif
  };
  std::vector<uint32_t> first;
  for (const auto& lanes : all) {
    if (dso_isa_runs_here(lanes.isa) != 1) continue;
    std::vector<uint32_t> bits;
    lanes.run(lanes.isa, bits);
    if (first.empty()) first = bits;
    check(bits == first, "%s: exp, exp2 or silu differ from another ISA's", lanes.isa);
  }
  check(!first.empty(), "no ISA runs here");
  return report("test_lanes");
}
