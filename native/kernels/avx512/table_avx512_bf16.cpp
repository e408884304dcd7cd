#define DSO_ISA_NAME "avx512-bf16"
#include "../avx512/lanes.hpp"
#include "../generic/table.inl"
