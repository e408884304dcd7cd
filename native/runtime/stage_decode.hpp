// Several decode steps of a model whose layers are divided among processes, in one call of each of them.
#pragma once
#include "dso.h"

namespace dso {

// In the first process, which has the first layers and what follows the last one, and chooses the tokens. See dso_stages.
void decode_stages(dso_plan& tail, const dso_batch& batch, dso_decode& d, dso_stages& stages);

// In each of the others. See dso_plan_follow.
void follow(dso_plan& plan, const dso_batch& batch, int32_t link);

}  // namespace dso
