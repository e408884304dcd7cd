#include "../avx512/bit_lanes.hpp"
#include "../generic/train_elementwise.inl"
