#define DSO_ISA_NAME "avx2-vnni"
#include "../avx2/lanes.hpp"
#include "../generic/table.inl"
