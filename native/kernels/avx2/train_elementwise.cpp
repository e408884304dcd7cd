#include "lanes.hpp"
#include "../generic/train_elementwise.inl"
