#include "lanes.hpp"
#include "../generic/rows.inl"
