// Defines the LatentKernels of a variant with tile registers: queries over the rows of a latent cache in bf16, int8 or int4. As
// in generic/attention.inl: nothing from the standard library that emits code.
#include "../kernels.hpp"
#include "../avx512/lanes.hpp"
#include "dso.h"
#ifdef __AMX_BF16__
#include "tile.hpp"
#else
#include "tile_emulated.hpp"
#endif
#include "../generic/math.hpp"
// After math.hpp, whose names they use.
#include "../generic/convert.hpp"
#include "index_scores.hpp"
#include "mla_decode.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const LatentKernels latent_kernels;  // `extern`, because a const object would otherwise be local to this unit
const LatentKernels latent_kernels = {
    .mla_scratch = tiled::mla_scratch,
    .mla_query_bytes = mla_query_bytes,
    .mla_query = mla_query,
    .mla_tokens = tiled::mla_tokens,
    .mla_attend = tiled::mla_attend,
    .index_query = index_query,
    .index_query_bytes = index_query_bytes,
    .index_scores = tiled::index_scores,
};
}  // namespace dso::DSO_ISA_NAMESPACE
