#include "../avx512/lanes.hpp"
#include "../generic/train_elementwise.inl"
