// Argument checks at the start of every function of the C interface.
#pragma once
#include "context.hpp"
#include "error.hpp"

namespace dso {

template <class T>
T& given(T* p, const char* name) {
  if (!p) fail(DSO_EINVAL, "%s is NULL", name);
  return *p;
}

inline Context& shared(dso_context* c) { return *given(c, "context").shared; }

}  // namespace dso
