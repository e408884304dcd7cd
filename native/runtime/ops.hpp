// From a step to its op: one maker per kind of step. Each checks everything it relies on (Error DSO_EINVAL names the step and
// the field), so that running needs no checks of the plan.
#pragma once
#include <memory>

#include "op.hpp"
#include "step_reader.hpp"

namespace dso {

// op_table.cpp
std::unique_ptr<Op> make_op(StepReader& step);  // by step.op
const char* op_name(const Kernels& kernels, int32_t op);
const ElementwiseOp& elementwise_op(const Kernels& kernels, int32_t op);    // one that is in the table
const ElementwiseOp* find_elementwise(const Kernels& kernels, int32_t op);  // null: it is not

// Number of leading rows, among rows of this kind, of sequences in decode phase.
inline int64_t decode_rows(const Run& run, const SlotRef& rows) {
  return rows.selected ? run.batch.decode_logits : run.batch.decode_rows;
}

// Writes columns [begin, end) of a row of any kind from fp32: converted kinds need whole groups of 32.
inline void write_columns(const Run& run, const SlotRef& to, int64_t row, const float* from, int64_t begin, int64_t end) {
  const Rows& rows = run.slots[to.index];
  if (is_f32(to.kind))
    std::copy(from, from + (end - begin), rows.f32(row) + begin);
  else
    run.kernels.convert(to.kind, from, begin, end, to.width, rows.row(row));
}

// ops_elementwise.cpp
std::unique_ptr<Op> make_elementwise(StepReader& step, const ElementwiseOp& kernel);
std::unique_ptr<Op> make_embedding(StepReader& step);
std::unique_ptr<Op> make_rms_norm(StepReader& step);
std::unique_ptr<Op> make_layer_norm(StepReader& step);
std::unique_ptr<Op> make_add_rms_norm(StepReader& step);
std::unique_ptr<Op> make_convert(StepReader& step);
std::unique_ptr<Op> make_select_rows(StepReader& step);
std::unique_ptr<Op> make_hidden_out(StepReader& step);
std::unique_ptr<Op> make_state_in(StepReader& step);
std::unique_ptr<Op> make_draft_out(StepReader& step);
std::unique_ptr<Op> make_add_features(StepReader& step);
std::unique_ptr<Op> make_concat(StepReader& step);
std::unique_ptr<Op> make_sigmoid_gate(StepReader& step);
std::unique_ptr<Op> make_columns(StepReader& step);
std::unique_ptr<Op> make_clamp(StepReader& step);
// ops_collective.cpp
std::unique_ptr<Op> make_publish(StepReader& step);
std::unique_ptr<Op> make_sum_parts(StepReader& step);
std::unique_ptr<Op> make_join_parts(StepReader& step);
// ops_recurrent.cpp
std::unique_ptr<Op> make_short_conv(StepReader& step);
std::unique_ptr<Op> make_delta_rule(StepReader& step);
// ops_rope.cpp
std::unique_ptr<Op> make_rope_table(StepReader& step);
std::unique_ptr<Op> make_rope(StepReader& step);
std::unique_ptr<Op> make_position_scale(StepReader& step);
std::unique_ptr<Op> make_cache_write(StepReader& step);
std::unique_ptr<Op> make_rope_cache(StepReader& step);
// ops_attention.cpp
std::unique_ptr<Op> make_attention(StepReader& step);
// ops_grids.cpp
std::unique_ptr<Op> make_grid_queries(StepReader& step);
std::unique_ptr<Op> make_grid_keys(StepReader& step);
std::unique_ptr<Op> make_zero_padding(StepReader& step);

// ops_encoder.cpp
std::unique_ptr<Op> make_encoder_attention(StepReader& step);
// ops_block_choose.cpp
std::unique_ptr<Op> make_block_choose(StepReader& step);
std::unique_ptr<Op> make_latent_choose(StepReader& step);
// ops_indexer.cpp
std::unique_ptr<Op> make_index_write(StepReader& step);
std::unique_ptr<Op> make_index_choose(StepReader& step);
std::unique_ptr<Op> make_entries_choose(StepReader& step);
// ops_latent.cpp
std::unique_ptr<Op> make_latent(StepReader& step);
std::unique_ptr<Op> make_latent_write(StepReader& step);
// ops_mla.cpp
std::unique_ptr<Op> make_mla_absorb(StepReader& step);
std::unique_ptr<Op> make_mla_value(StepReader& step);
// ops_mla_attention.cpp
std::unique_ptr<Op> make_mla_attention(StepReader& step);
// ops_linear.cpp
std::unique_ptr<Op> make_linear(StepReader& step);
std::unique_ptr<Op> make_gate_up(StepReader& step);
std::unique_ptr<Op> make_linear_gelu(StepReader& step);
// ops_lora.cpp
std::unique_ptr<Op> make_lora_down(StepReader& step);
std::unique_ptr<Op> make_lora_up(StepReader& step);
// ops_route.cpp
std::unique_ptr<Op> make_route(StepReader& step);
std::unique_ptr<Op> make_hash_route(StepReader& step);
// ops_streams.cpp
std::unique_ptr<Op> make_stream_weights(StepReader& step);
std::unique_ptr<Op> make_stream_collapse(StepReader& step);
std::unique_ptr<Op> make_stream_expand(StepReader& step);
// ops_compress.cpp
std::unique_ptr<Op> make_rows_write(StepReader& step);
std::unique_ptr<Op> make_compress(StepReader& step);
// ops_compressed_attention.cpp
std::unique_ptr<Op> make_compressed_attention(StepReader& step);
// ops_grouped_linear.cpp
std::unique_ptr<Op> make_grouped_linear(StepReader& step);
// ops_experts.cpp
std::unique_ptr<Op> make_experts_gate_up(StepReader& step);
std::unique_ptr<Op> make_experts_down(StepReader& step);

}  // namespace dso
