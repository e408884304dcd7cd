#define DSO_BASE avx512
#include "lanes.hpp"
#include "../generic/linear_dot.inl"
