// The ISA variants this library was built with, what each needs, and the choice among them.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace dso {

struct Isa {
  const char* name;
  uint32_t needs;               // a set of Feature
  const Kernels* (*kernels)();  // null where the compiler could not build it
  bool automatic;               // may be chosen by itself
};

const std::vector<Isa>& isas();         // best last; names as in dso.h
const Isa* find_isa(const char* name);  // null for an unknown name
bool runs_here(const Isa& isa);

// The kernels called `name`, or the best that run here (null). Error DSO_EISA says what is missing.
const Kernels& choose_kernels(const char* name);

}  // namespace dso
