#define DSO_ISA_NAME "avx512-vnni"
#include "../avx512/lanes.hpp"
#include "../generic/table.inl"
