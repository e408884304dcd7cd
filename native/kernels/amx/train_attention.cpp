#include "../avx512/lanes.hpp"
#include "../generic/train_attention.inl"
