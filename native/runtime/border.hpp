// What every function at the C border begins with.
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
