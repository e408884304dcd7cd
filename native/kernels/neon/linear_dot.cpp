#define DSO_BASE neon
#include "lanes.hpp"
#include "lane_panels.hpp"
#include "../generic/linear_dot.inl"
