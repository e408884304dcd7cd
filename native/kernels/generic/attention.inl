// Defines this variant's AttentionKernels and LatentKernels; included once, after its lanes. As in linear.inl: nothing from the
// standard library that emits code.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp, whose names they use.
#include "convert.hpp"

#include "attention_decode.hpp"
#include "attention_eager.hpp"
#include "attention_prefill.hpp"
#include "index_scores.hpp"
#include "mla_decode.hpp"
#include "mla_prefill.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const AttentionKernels attention_kernels;  // `extern`, because a const object would otherwise be local to this unit
const AttentionKernels attention_kernels = {
    .attn_decode_chunk = attn_decode_chunk,
    .attn_merge = attn_merge,
    .attn_fold = attn_fold,
    .attn_prefill = attn_prefill,
    .attn_eager = attn_eager,
    .attn_scratch = attn_scratch_bytes,
    .mla_rows = mla_rows,
    .mla_panel_bytes = mla_panel_bytes,
    .mla_panels = mla_panels,
    .mla_expanded = mla_expanded,
};

extern const LatentKernels latent_kernels;
const LatentKernels latent_kernels = {
    .mla_scratch = mla_scratch,
    .mla_query_bytes = mla_query_bytes,
    .mla_query = mla_query,
    .mla_tokens = mla_tokens,
    .mla_attend = mla_attend,
    .index_query = index_query,
    .index_query_bytes = index_query_bytes,
    .index_scores = index_scores,
};
}  // namespace dso::DSO_ISA_NAMESPACE
