#include "lanes.hpp"
#include "pairs.hpp"
#include "../generic/linear.inl"
