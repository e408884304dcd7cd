#include "lanes.hpp"
#include "../generic/linear.inl"
