#define DSO_ISA_NAME "avx512"
#include "../avx512/lanes.hpp"
#include "../generic/table.inl"
