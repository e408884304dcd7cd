// Several decode steps of a plan in one call.
#pragma once
#include "dso.h"

namespace dso {

void decode(dso_plan& plan, const dso_batch& batch, dso_decode& d);  // see dso_decode

}  // namespace dso
