#include "lanes.hpp"
#include "../generic/train_attention.inl"
