#define DSO_ISA_NAMESPACE avx512_vnni
#define DSO_ISA_NAME "avx512-vnni"
#include "../avx512/lanes.hpp"
#include "../generic/table.inl"
