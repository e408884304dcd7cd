#define DSO_BASE avx2
#include "lanes.hpp"
#include "../generic/linear_dot.inl"
