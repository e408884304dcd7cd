// The ops of plans that are not element-wise: number, name for messages, maker. Element-wise ops are in the table of each ISA's
// kernels (kernels/generic/elementwise_ops.hpp).
#include <algorithm>
#include <iterator>

#include "ops.hpp"

namespace dso {
namespace {

struct Entry {
  int32_t op;
  const char* name;
  std::unique_ptr<Op> (*make)(StepReader& step);
};

constexpr Entry kOps[] = {
    {DSO_OP_EMBEDDING, "EMBEDDING", make_embedding},
    {DSO_OP_RMS_NORM, "RMS_NORM", make_rms_norm},
    {DSO_OP_ADD_RMS_NORM, "ADD_RMS_NORM", make_add_rms_norm},
    {DSO_OP_CONVERT, "CONVERT", make_convert},
    {DSO_OP_LINEAR, "LINEAR", make_linear},
    {DSO_OP_ROPE_TABLE, "ROPE_TABLE", make_rope_table},
    {DSO_OP_ROPE, "ROPE", make_rope},
    {DSO_OP_POSITION_SCALE, "POSITION_SCALE", make_position_scale},
    {DSO_OP_CACHE_WRITE, "CACHE_WRITE", make_cache_write},
    {DSO_OP_ROPE_CACHE, "ROPE_CACHE", make_rope_cache},
    {DSO_OP_ATTENTION, "ATTENTION", make_attention},
    {DSO_OP_ENCODER_ATTENTION, "ENCODER_ATTENTION", make_encoder_attention},
    {DSO_OP_GRID_QUERIES, "GRID_QUERIES", make_grid_queries},
    {DSO_OP_GRID_KEYS, "GRID_KEYS", make_grid_keys},
    {DSO_OP_ZERO_PADDING, "ZERO_PADDING", make_zero_padding},
    {DSO_OP_GATE_UP, "GATE_UP", make_gate_up},
    {DSO_OP_LINEAR_GELU, "LINEAR_GELU", make_linear_gelu},
    {DSO_OP_LATENT, "LATENT", make_latent},
    {DSO_OP_LATENT_WRITE, "LATENT_WRITE", make_latent_write},
    {DSO_OP_MLA_ABSORB, "MLA_ABSORB", make_mla_absorb},
    {DSO_OP_MLA_ATTENTION, "MLA_ATTENTION", make_mla_attention},
    {DSO_OP_MLA_VALUE, "MLA_VALUE", make_mla_value},
    {DSO_OP_SELECT_ROWS, "SELECT_ROWS", make_select_rows},
    {DSO_OP_HIDDEN_OUT, "HIDDEN_OUT", make_hidden_out},
    {DSO_OP_STATE_IN, "STATE_IN", make_state_in},
    {DSO_OP_DRAFT_OUT, "DRAFT_OUT", make_draft_out},
    {DSO_OP_ADD_FEATURES, "ADD_FEATURES", make_add_features},
    {DSO_OP_CONCAT, "CONCAT", make_concat},
    {DSO_OP_SIGMOID_GATE, "SIGMOID_GATE", make_sigmoid_gate},
    {DSO_OP_LAYER_NORM, "LAYER_NORM", make_layer_norm},
    {DSO_OP_INDEX_WRITE, "INDEX_WRITE", make_index_write},
    {DSO_OP_INDEX_CHOOSE, "INDEX_CHOOSE", make_index_choose},
    {DSO_OP_BLOCK_CHOOSE, "BLOCK_CHOOSE", make_block_choose},
    {DSO_OP_LATENT_CHOOSE, "LATENT_CHOOSE", make_latent_choose},
    {DSO_OP_COLUMNS, "COLUMNS", make_columns},
    {DSO_OP_CLAMP, "CLAMP", make_clamp},
    {DSO_OP_SHORT_CONV, "SHORT_CONV", make_short_conv},
    {DSO_OP_DELTA_RULE, "DELTA_RULE", make_delta_rule},
    {DSO_OP_LORA_DOWN, "LORA_DOWN", make_lora_down},
    {DSO_OP_LORA_UP, "LORA_UP", make_lora_up},
    {DSO_OP_ROUTE, "ROUTE", make_route},
    {DSO_OP_HASH_ROUTE, "HASH_ROUTE", make_hash_route},
    {DSO_OP_STREAM_WEIGHTS, "STREAM_WEIGHTS", make_stream_weights},
    {DSO_OP_STREAM_COLLAPSE, "STREAM_COLLAPSE", make_stream_collapse},
    {DSO_OP_STREAM_EXPAND, "STREAM_EXPAND", make_stream_expand},
    {DSO_OP_ROWS_WRITE, "ROWS_WRITE", make_rows_write},
    {DSO_OP_COMPRESS, "COMPRESS", make_compress},
    {DSO_OP_ENTRIES_CHOOSE, "ENTRIES_CHOOSE", make_entries_choose},
    {DSO_OP_COMPRESSED_ATTENTION, "COMPRESSED_ATTENTION", make_compressed_attention},
    {DSO_OP_GROUPED_LINEAR, "GROUPED_LINEAR", make_grouped_linear},
    {DSO_OP_EXPERTS_GATE_UP, "EXPERTS_GATE_UP", make_experts_gate_up},
    {DSO_OP_EXPERTS_DOWN, "EXPERTS_DOWN", make_experts_down},
    {DSO_OP_PUBLISH, "PUBLISH", make_publish},
    {DSO_OP_SUM_PARTS, "SUM_PARTS", make_sum_parts},
    {DSO_OP_JOIN_PARTS, "JOIN_PARTS", make_join_parts},
};

template <class Row>
const Row* find(const Row* begin, const Row* end, int32_t op) {
  const Row* row = std::find_if(begin, end, [op](const Row& r) { return r.op == op; });
  return row == end ? nullptr : row;
}
const Entry* find_op(int32_t op) { return find(std::begin(kOps), std::end(kOps), op); }

}  // namespace

const ElementwiseOp* find_elementwise(const Kernels& k, int32_t op) {
  return find(k.elementwise_ops, k.elementwise_ops + k.elementwise_count, op);
}

const ElementwiseOp& elementwise_op(const Kernels& kernels, int32_t op) { return *find_elementwise(kernels, op); }

const char* op_name(const Kernels& kernels, int32_t op) {
  if (const Entry* entry = find_op(op)) return entry->name;
  const ElementwiseOp* elementwise = find_elementwise(kernels, op);
  return elementwise ? elementwise->name : "unknown op";
}

std::unique_ptr<Op> make_op(StepReader& s) {
  if (const Entry* entry = find_op(s.step.op)) return entry->make(s);
  if (const ElementwiseOp* elementwise = find_elementwise(s.plan().kernels, s.step.op))
    return make_elementwise(s, *elementwise);
  s.refuse("op %d is unknown", s.step.op);
}

}  // namespace dso
