#include "lanes.hpp"
#include "../generic/attention.inl"
