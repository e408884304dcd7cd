#include "../avx512/lanes.hpp"
#include "../generic/train_product.inl"
