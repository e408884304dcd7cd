// Several rounds of decoding with drafts (dso_plan_decode_drafted).
#pragma once
#include "dso.h"

namespace dso {
void decode_drafted(dso_plan& model, const dso_batch& batch, dso_plan& drafter, const dso_batch& pending,
                    dso_drafted_decode& d);
}  // namespace dso
