#include "bit_lanes.hpp"
#include "../generic/train_elementwise.inl"
