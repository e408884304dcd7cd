#include "lanes.hpp"
#include "../x86/word_dots.hpp"
#include "../generic/linear.inl"
