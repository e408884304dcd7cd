#include "lanes.hpp"
#include "../generic/train_product.inl"
