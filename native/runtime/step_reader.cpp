#include "step_reader.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <limits>

#include "error.hpp"
#include "layout.hpp"
#include "ops.hpp"
#include "states.hpp"

namespace dso {
namespace {

bool allowed(SlotKinds kinds, int32_t kind) {
  const bool integer = kind == DSO_SLOT_Q8 || kind == DSO_SLOT_Q16;
  switch (kinds) {
    case kF32Only:
      return is_f32(kind);
    case kInteger:
      return integer;
    case kConverted:
      return integer || kind == DSO_SLOT_BF16;
    case kAnyKind:
      return true;
  }
  return false;
}

}  // namespace

StepReader::StepReader(PlanSource& plan, const dso_step& step, int32_t index) : step(step), plan_(plan), index_(index) {}

std::string StepReader::name() const { return text("step %d (%s)", index_, op_name(plan_.kernels, step.op)); }

void StepReader::refuse(const char* format, ...) const {
  char message[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(message, sizeof message, format, args);
  va_end(args);
  fail(DSO_EINVAL, "%s: %s", name().c_str(), message);
}

SlotRef StepReader::slot(const char* field, int i, int32_t index, SlotKinds kinds) const {
  if (index < 0 || index >= plan_.n_slots)
    refuse("%s[%d] is slot %d, but the plan has %d slots", field, i, index, plan_.n_slots);
  const dso_slot& s = plan_.slots[index];
  if (!allowed(kinds, s.kind)) refuse("%s[%d] may not be %s (slot %d)", field, i, kind_name(s.kind), index);
  return {index, s.kind, s.width, s.selected != 0, std::max(1, s.repeat)};
}

SlotRef StepReader::in(int i, SlotKinds kinds, int64_t width, int64_t repeat) {
  const SlotRef s = slot("in", i, step.in[i], kinds);
  if (width && s.width != width)
    refuse("in[%d] must have width %lld, but slot %d has %lld", i, (long long)width, s.index, (long long)s.width);
  if (s.repeat != repeat)
    refuse("in[%d], slot %d, has %lld rows per token, must have %lld", i, s.index, (long long)s.repeat, (long long)repeat);
  if (!plan_.written[s.index]) refuse("in[%d] is slot %d, which no earlier step writes", i, s.index);
  reads.push_back(s.index);
  return s;
}

SlotRef StepReader::token_rows(int i, int64_t width) {
  const SlotRef s = in(i, kF32Only, width);
  if (s.selected) refuse("in[%d], slot %d, holds selected rows", i, s.index);
  return s;
}

SlotRef StepReader::activations(const Matrix& w, int64_t repeat) {
  const SlotRef s = in(0, kAnyKind, w.cols, repeat);
  if (!dso::reads(w.format, s.kind))
    refuse("in[0] is %s (slot %d), which %s weights do not support", kind_name(s.kind), s.index, format_name(w.format));
  return s;
}

SlotRef StepReader::out(int i, SlotKinds kinds, int64_t width, bool selected, int64_t repeat) {
  const SlotRef s = slot("out", i, step.out[i], kinds);
  if (width && s.width != width)
    refuse("out[%d] must have width %lld, but slot %d has %lld", i, (long long)width, s.index, (long long)s.width);
  if (s.repeat != repeat)
    refuse("out[%d], slot %d, has %lld rows per token, must have %lld", i, s.index, (long long)s.repeat, (long long)repeat);
  if (s.selected != selected) refuse("out[%d], slot %d, must hold %s rows", i, s.index, selected ? "the selected" : "all");
  if (std::find(writes.begin(), writes.end(), s.index) != writes.end())
    refuse("out[%d] is slot %d, the same as another output", i, s.index);
  writes.push_back(s.index);
  return s;
}

const dso_weight& StepReader::weight(char field, int i) const {
  const int32_t index = (field == 'w' ? step.w : step.b)[i];
  if (index < 0 || index >= plan_.n_weights)
    refuse("%c[%d] is weight %d, but the plan has %d weights", field, i, index, plan_.n_weights);
  return plan_.weights[index];
}

Matrix StepReader::matrix(int i) const {
  return check_matrix(weight('w', i), name() + text(": w[%d] (weight %d)", i, step.w[i]));
}

Stack StepReader::stack(int i, int64_t count) const {
  return check_stack(weight('w', i), count, name() + text(": w[%d] (weight %d)", i, step.w[i]));
}

const float* StepReader::vector(int field, int i, int64_t cols) const {
  const int32_t index = (field == 'w' ? step.w : step.b)[i];
  return check_vector(weight(char(field), i), cols, name() + text(": %c[%d] (weight %d)", field, i, index));
}

int64_t StepReader::vector_size(int i) const { return weight('w', i).cols; }

const float* StepReader::bias(int i, int64_t rows) const { return step.b[i] == -1 ? nullptr : vector('b', i, rows); }

int32_t StepReader::positive(const char* field, int32_t value) const {
  if (value < 1 || value > (1 << 24)) refuse("%s is %d, must be from 1 to 2^24", field, value);
  return value;
}

float StepReader::eps() const {
  if (!(step.eps >= 0 && step.eps <= std::numeric_limits<float>::max()))
    refuse("eps is %g, must be finite and not negative", double(step.eps));
  return step.eps;
}

Chosen StepReader::chosen() const {
  if (step.experts < 1 || step.experts > kMostExperts)
    refuse("experts is %d, must be from 1 to %d", step.experts, kMostExperts);
  if (step.top_k < 1 || step.top_k > step.experts)
    refuse("top_k is %d, must be from 1 to experts, %d", step.top_k, step.experts);
  return {step.experts, step.top_k};
}

void StepReader::attends(int32_t layer, int32_t kv_heads, int32_t head_dim, bool writes_cache) {
  BatchNeeds& needs = plan_.needs;
  positive("kv_heads", kv_heads);
  if (!is_head_dim(head_dim)) refuse("head_dim is %d, must be even and at most %d", head_dim, int(max_head_dim));
  if (needs.rank > 0 || needs.index > 0) refuse("the step uses heads, but an earlier step uses latents: a cache has one kind");
  uses_layer(layer, writes_cache);
  needs.heads.resize(size_t(needs.layers));
  HeadsShape& shape = needs.heads[size_t(layer)];
  if (shape.kv_heads && (shape.kv_heads != kv_heads || shape.head_dim != head_dim))
    refuse("kv_heads is %d and head_dim %d, but an earlier step has %d and %d in layer %d of the cache", kv_heads, head_dim,
           shape.kv_heads, shape.head_dim, layer);
  shape = {kv_heads, head_dim};
}

void StepReader::attends_latent(int32_t layer, int32_t rank, int32_t rope, bool writes_cache) {
  BatchNeeds& needs = plan_.needs;
  positive("rank", rank);
  positive("rope", rope);
  if (!needs.heads.empty()) refuse("the step uses latents, but an earlier step uses heads: a cache has one kind");
  if (needs.rank > 0 && (needs.rank != rank || needs.rope != rope))
    refuse("rank is %d and rope %d, but an earlier step has %lld and %lld: the cache has one shape", rank, rope,
           (long long)needs.rank, (long long)needs.rope);
  needs.rank = rank;
  needs.rope = rope;
  uses_layer(layer, writes_cache);
}

void StepReader::attends_index(int32_t layer, int32_t index, bool writes_cache) {
  BatchNeeds& needs = plan_.needs;
  positive("index", index);
  if (!needs.heads.empty()) refuse("the step uses index keys, but an earlier step uses heads: a cache has one kind");
  if (needs.index > 0 && needs.index != index)
    refuse("index is %d, but an earlier step has %lld: the cache has one shape", index, (long long)needs.index);
  needs.index = index;
  uses_layer(layer, writes_cache);
}

void StepReader::uses_rows(int32_t kind, int64_t width, int64_t every, bool writes_cache) {
  BatchNeeds& needs = plan_.needs;
  if (!needs.heads.empty() || needs.rank > 0 || needs.index > 0)
    refuse("the step uses rows, but an earlier step uses heads or latents: a cache has one kind");
  uses_layer(kind, writes_cache);
  needs.rows.resize(size_t(needs.layers));
  RowsShape& shape = needs.rows[size_t(kind)];
  if (shape.width && (shape.width != width || shape.every != every))
    refuse("rows of %lld elements for %lld tokens, but an earlier step has %lld for %lld as kind %d", (long long)width,
           (long long)every, (long long)shape.width, (long long)shape.every, kind);
  shape.width = width;
  shape.every = every;
}

void StepReader::attends_rows(int32_t kind, int64_t width, int64_t every, int64_t window, bool plain) {
  uses_rows(kind, width, every, false);
  plan_.needs.rows[size_t(kind)].plain |= plain;
  plan_.needs.visible[size_t(kind)].add({true, window == 0, window, 0});
}

void StepReader::writes_rows(int32_t kind, int64_t width, int64_t every) { uses_rows(kind, width, every, true); }

int32_t StepReader::has_state(int64_t heads, int64_t rows, int64_t cols) {
  std::vector<dso_state_shape>& states = plan_.needs.recurrent;
  const int32_t index = step.state;
  if (index < 0 || index >= 65536) refuse("state is %d, must be from 0 to 65535", index);
  const dso_state_shape shape{int32_t(heads), int32_t(rows), int32_t(cols)};
  state_bytes(shape);
  if (size_t(index) >= states.size()) states.resize(index + 1);
  if (states[index].heads != 0) refuse("state %d is an earlier step's", index);
  states[index] = shape;
  return index;
}

void StepReader::adapts(int32_t index, const dso_adapter_site& shape, int32_t rank) {
  BatchNeeds& needs = plan_.needs;
  if (index < 0 || index >= 1 << 20) refuse("index (the site) is %d, out of range", index);
  if (needs.adapter_rank && needs.adapter_rank != rank)
    refuse("rank is %d, but an earlier step has %d", rank, needs.adapter_rank);
  needs.adapter_rank = rank;
  if (size_t(index) >= needs.adapter_sites.size()) needs.adapter_sites.resize(size_t(index) + 1);
  dso_adapter_site& site = needs.adapter_sites[size_t(index)];
  if ((shape.rows && site.rows) || (shape.cols && site.cols)) refuse("site %d is an earlier step's", index);
  if (site.heads && site.heads != shape.heads)
    refuse("site %d has %d heads, but an earlier step says %d", index, shape.heads, site.heads);
  site.rows += shape.rows;
  site.cols += shape.cols;
  site.heads = shape.heads;
}

void StepReader::sees(int64_t window, int64_t sinks) {
  plan_.needs.visible[size_t(step.layer)].add({true, window == 0, window, sinks});
}

void StepReader::uses_layer(int32_t layer, bool writes_cache) {
  if (layer < 0 || layer >= 65536) refuse("layer is %d, must be from 0 to 65535", layer);
  plan_.needs.layers = std::max<int64_t>(plan_.needs.layers, layer + 1);
  plan_.needs.visible.resize(size_t(plan_.needs.layers));
  plan_.needs.visible[size_t(layer)].used = true;
  (writes_cache ? writes : reads).push_back(shared_resource() + 1 + layer);
}

void StepReader::takes(int ins, int outs, int ws, int bs, int32_t flags) const {
  auto absent = [this](const char* field, const int32_t* values, int from, int to) {
    for (int i = from; i < to; ++i)
      if (values[i] != -1) refuse("%s[%d] is %d, must be -1: the op does not use it", field, i, values[i]);
  };
  absent("in", step.in, ins, 4);
  absent("out", step.out, outs, 3);
  absent("w", step.w, ws, 3);
  absent("b", step.b, bs, 3);
  if (step.flags & ~flags) refuse("flags are %d, some of which the op does not support", step.flags);
}

void StepReader::alias_only(const SlotRef& out, const SlotRef& in) {
  if (out.index == in.index) return;
  if (std::find(reads.begin(), reads.end(), out.index) != reads.end())
    refuse("slot %d is both an input and an output", out.index);
}

void StepReader::done() {
  for (int32_t w : writes)
    if (w < plan_.n_slots) plan_.written[w] = true;
}

}  // namespace dso
