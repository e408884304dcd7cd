// Fills this variant's Kernels. Included once, at the end of a translation unit that has DSO_ISA_NAMESPACE (from
// CMakeLists.txt; the accessor is dso::kernels_<namespace>), has defined DSO_ISA_NAME, and included its lanes. A variant with
// matrix units of its own also defines DSO_LINEAR and DSO_LINEAR_SCRATCH, the entries that replace the generic ones.
//
// The headers here may use nothing from the standard library that emits code: an inline function compiled for this ISA
// could be the copy that the linker keeps for all.
#include "../kernels.hpp"
#include "dso.h"
#include "math.hpp"
// After math.hpp: they use its names.
#include "attention_decode.hpp"
#include "attention_eager.hpp"
#include "attention_prefill.hpp"
#include "convert.hpp"
#include "elementwise.hpp"
#include "elementwise_ops.hpp"
#include "index.hpp"
#include "kv.hpp"
#include "latent.hpp"
#include "linear.hpp"
#include "mla_decode.hpp"
#include "mla_prefill.hpp"
#include "pack.hpp"
#include "summaries.hpp"
#include "rotate.hpp"

#ifndef DSO_LINEAR
#define DSO_LINEAR linear
#define DSO_LINEAR_SCRATCH linear_scratch_bytes
#endif
#define DSO_JOIN_(a, b) a##b
#define DSO_JOIN(a, b) DSO_JOIN_(a, b)

namespace dso::DSO_ISA_NAMESPACE {
extern const TrainProduct train_product;
extern const TrainElementwise train_elementwise;
extern const TrainAttention train_attention;
}  // namespace dso::DSO_ISA_NAMESPACE

namespace dso {
const Kernels* DSO_JOIN(kernels_, DSO_ISA_NAMESPACE)() {
  namespace isa = DSO_ISA_NAMESPACE;
  static constexpr Kernels table = {
      .isa = DSO_ISA_NAME,
      .elementwise_ops = isa::elementwise_ops,
      .elementwise_count = sizeof isa::elementwise_ops / sizeof *isa::elementwise_ops,
      .convert = isa::convert,
      .linear = isa::DSO_LINEAR,
      .linear_scratch = isa::DSO_LINEAR_SCRATCH,
      .embed_row = isa::embed_row,
      .unpack_rows = isa::unpack_rows,
      .pack_tile = isa::pack_tile,
      .rms_norm = isa::rms_norm,
      .layer_norm = isa::layer_norm,
      .add = isa::add,
      .swiglu = isa::swiglu,
      .softmax = isa::softmax,
      .sigmoid = isa::sigmoid,
      .add_scaled = isa::add_scaled,
      .rope = isa::rope,
      .kv_layer_bytes = isa::kv_layer_bytes,
      .kv_write = isa::kv_write,
      .kv_read = isa::kv_read,
      .kv_rotate = isa::kv_rotate,
      .attn_decode_chunk = isa::attn_decode_chunk,
      .attn_merge = isa::attn_merge,
      .attn_fold = isa::attn_fold,
      .attn_prefill = isa::attn_prefill,
      .attn_eager = isa::attn_eager,
      .attn_scratch = isa::attn_scratch_bytes,
      .kv_summarise = isa::kv_summarise,
      .latent_summarise = isa::latent_summarise,
      .block_estimates = isa::block_estimates,
      .block_scores = isa::block_scores,
      .index_write = isa::index_write,
      .index_query = isa::index_query,
      .index_query_bytes = isa::index_query_bytes,
      .index_scores = isa::index_scores,
      .index_select = isa::index_select,
      .latent_write = isa::latent_write,
      .latent_read = isa::latent_read,
      .latent_rotate = isa::latent_rotate,
      .mla_scratch = isa::mla_scratch,
      .mla_query_bytes = isa::mla_query_bytes,
      .mla_query = isa::mla_query,
      .mla_tokens = isa::mla_tokens,
      .mla_attend = isa::mla_attend,
      .mla_rows = isa::mla_rows,
      .mla_panel_bytes = isa::mla_panel_bytes,
      .mla_panels = isa::mla_panels,
      .mla_expanded = isa::mla_expanded,
      .train_product = &isa::train_product,
      .train_elementwise = &isa::train_elementwise,
      .train_attention = &isa::train_attention,
  };
  return &table;
}
}  // namespace dso
