#define DSO_ISA_NAMESPACE avx512_bf16
#define DSO_ISA_NAME "avx512-bf16"
#include "../avx512/lanes.hpp"
#include "../generic/table.inl"
