// Defines this variant's RowKernels; included once, after its lanes. As in linear.inl: nothing from the standard library that
// emits code.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp, whose names they use.
#include "convert.hpp"
#include "elementwise.hpp"
#include "elementwise_ops.hpp"
#include "choice.hpp"
#include "compress.hpp"
#include "index.hpp"
#include "kv.hpp"
#include "latent.hpp"
#include "low_rank.hpp"
#include "pack.hpp"
#include "recurrent.hpp"
#include "rotate.hpp"
#include "summaries.hpp"

namespace dso::DSO_ISA_NAMESPACE {
extern const RowKernels row_kernels;  // `extern`, because a const object would otherwise be local to this unit
const RowKernels row_kernels = {
    .elementwise_ops = elementwise_ops,
    .elementwise_count = sizeof elementwise_ops / sizeof *elementwise_ops,
    .convert = convert,
    .restore = restore,
    .embed_row = embed_row,
    .unpack_rows = unpack_rows,
    .pack_tile = pack_tile,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .add = add,
    .swiglu = swiglu,
    .geglu = geglu,
    .clamped_swiglu = clamped_swiglu,
    .softmax = softmax,
    .sigmoid = sigmoid,
    .add_scaled = add_scaled,
    .scale = scale,
    .sigmoid_gate = sigmoid_gate,
    .clamp = clamp,
    .vector_product = vector_product,
    .rope = rope,
    .short_conv = short_conv,
    .unit_length = unit_length,
    .delta_rule = delta_rule,
    .low_rank = low_rank_product,
    .kv_layer_bytes = kv_layer_bytes,
    .kv_write = kv_write,
    .kv_read = kv_read,
    .kv_rotate = kv_rotate,
    .kv_summarize = kv_summarize,
    .latent_summarize = latent_summarize,
    .block_estimates = block_estimates,
    .block_scores = block_scores,
    .index_write = index_write,
    .index_select = index_select,
    .latent_write = latent_write,
    .latent_read = latent_read,
    .latent_rotate = latent_rotate,
    .compress_entry = compress_entry,
    .first_largest = first_largest,
    .smallest = smallest,
    .divide = divide,
    .quotients = quotients,
    .exp_differences = exp_differences,
    .column_maxima = column_maxima,
    .at_least_indices = at_least_indices,
};
}  // namespace dso::DSO_ISA_NAMESPACE
