#define DSO_BASE neon
#include "lanes.hpp"
#include "lane_dots.hpp"
#include "../generic/linear_dot.inl"
