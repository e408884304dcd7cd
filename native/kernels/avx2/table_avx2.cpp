#define DSO_ISA_NAME "avx2"
#include "../avx2/lanes.hpp"
#include "../generic/table.inl"
