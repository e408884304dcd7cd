// The ISA variants of this build, their requirements, and the choice among them.
#pragma once
#include <cstdint>
#include <span>

#include "kernels.hpp"

namespace dso {

struct Isa {
  const char* name;
  uint32_t needs;               // a set of Feature
  const Kernels* (*kernels)();  // null if the compiler could not build it
  bool automatic;               // may be chosen automatically
};

std::span<const Isa> isas();            // of this processor, best last; names as in dso.h; in variants_<processor>.cpp
const Isa* find_isa(const char* name);  // null for an unknown name
bool runs_here(const Isa& isa);

// The kernels called `name`, or, if null, the best that run on this machine. Error DSO_EISA says what is missing.
const Kernels& choose_kernels(const char* name);

}  // namespace dso
