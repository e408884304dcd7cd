// Several decode steps of a plan in one call.
#pragma once
#include <functional>

#include "dso.h"

namespace dso {

// See dso_decode. run: a step of the plan, or of a model of which the plan is the end.
void decode(dso_plan& plan, const dso_batch& batch, dso_decode& d, const std::function<void(const dso_batch&)>& run);

}  // namespace dso
