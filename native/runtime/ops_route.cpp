// ROUTE: chooses each row's experts and their weights.
//
// Scores are a softmax or sigmoids in fp32. The choice is by score plus bias, in the best groups only, and exact: scores are
// compared as keys, whose upper half has the order of the values and whose lower half ranks the lower expert (or group) first
// among equals. A NaN ranks highest, as in torch.topk, so that it is chosen and reaches the row's result instead of being lost.
#include <algorithm>
#include <cmath>
#include <functional>

#include "ops.hpp"

namespace dso {
namespace {

using Key = uint64_t;

Key key(float value, int64_t index) {  // value is never -0: no score is, nor a sum with one
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t ordered = std::isnan(value) ? UINT32_MAX : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key(ordered) << 32 | (UINT32_MAX - uint32_t(index));
}
int64_t index_of(Key k) { return UINT32_MAX - uint32_t(k); }
float value_of(Key k) {
  const uint32_t ordered = uint32_t(k >> 32), bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Moves the `count` largest to the front, in descending order. Uses a heap: for six of 64, its top rejects nearly all others.
void largest_first(Key* keys, int64_t count, int64_t n) { std::partial_sort(keys, keys + count, keys + n, std::greater<>()); }

enum class Scoring { kSoftmax, kSigmoid, kSqrtSoftplus };

Scoring scoring(StepReader& s) {
  const bool sigmoid = s.step.flags & DSO_FLAG_SIGMOID, softplus = s.step.flags & DSO_FLAG_SQRT_SOFTPLUS;
  if (sigmoid && softplus) s.refuse("has the SIGMOID flag and the SQRT_SOFTPLUS flag");
  return sigmoid ? Scoring::kSigmoid : softplus ? Scoring::kSqrtSoftplus : Scoring::kSoftmax;
}

void score(const Run& run, Scoring scoring, const float* x, int64_t n, float* scores) {
  if (scoring != Scoring::kSqrtSoftplus)
    return (scoring == Scoring::kSigmoid ? run.kernels.sigmoid : run.kernels.softmax)(x, n, scores);
  for (int64_t i = 0; i < n; ++i) scores[i] = std::sqrt(x[i] > 20 ? x[i] : std::log1p(std::exp(x[i])));  // as torch's softplus
}

struct Routing {
  int64_t experts, top_k, groups, top_groups;
  Scoring scoring;
  bool top2, normalize;
  float scale;
  int64_t group() const { return experts / groups; }
};

class Route final : public RowOp {
 public:
  Route(const SlotRef& in, const SlotRef& out, const float* bias, const float* factors, const Routing& routing)
      : in_(in), out_(out), bias_(bias), factors_(factors), routing_(routing) {}
  int64_t scratch_bytes(const Run&) const override { return groups_at() + int64_t(sizeof(Key)) * routing_.groups; }

 private:
  int64_t keys_at() const { return round_up(4 * routing_.experts, 64); }
  int64_t groups_at() const { return keys_at() + int64_t(sizeof(Key)) * routing_.experts; }

  int64_t rows(const Run& run) const override { return run.slots[in_.index].count; }
  int64_t row_work() const override { return 8 * routing_.experts; }

  void row(const Run& run, int64_t r, int thread) override {
    uint8_t* scratch = run.thread_scratch(thread);
    float* scores = reinterpret_cast<float*>(scratch);
    Key* keys = reinterpret_cast<Key*>(scratch + keys_at());
    const int64_t experts = routing_.experts, top_k = routing_.top_k;
    score(run, routing_.scoring, run.slots[in_.index].f32(r), experts, scores);
    for (int64_t e = 0; e < experts; ++e) keys[e] = key(bias_ ? scores[e] + bias_[e] : scores[e], e);
    const int64_t candidates =
        routing_.groups > 1 ? keep_best_groups(keys, reinterpret_cast<Key*>(scratch + groups_at())) : experts;
    largest_first(keys, top_k, candidates);
    std::sort(keys, keys + top_k, [](Key a, Key b) { return index_of(a) < index_of(b); });

    float* numbers = run.slots[out_.index].f32(r);
    float *weights = numbers + top_k, sum = 0;
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t expert = index_of(keys[j]);
      numbers[j] = float(expert);
      sum += weights[j] = scores[expert];
    }
    const float whole = routing_.normalize ? sum + 1e-20f : 1.0f;
    for (int64_t j = 0; j < top_k; ++j) {
      weights[j] = weights[j] / whole * routing_.scale;
      if (factors_) weights[j] *= factors_[index_of(keys[j])];
    }
  }

  // Moves the keys of experts in the best groups to the front; returns their number.
  int64_t keep_best_groups(Key* keys, Key* groups) const {
    const int64_t n = routing_.group(), kept = routing_.top_groups;
    for (int64_t g = 0; g < routing_.groups; ++g) {
      Key best = 0, second = 0;
      for (const Key* k = keys + g * n; k < keys + (g + 1) * n; ++k) {
        second = std::max(second, std::min(best, *k));
        best = std::max(best, *k);
      }
      groups[g] = key(routing_.top2 ? value_of(best) + value_of(second) : value_of(best), g);
    }
    largest_first(groups, kept, routing_.groups);
    std::sort(groups, groups + kept, [](Key a, Key b) { return index_of(a) < index_of(b); });  // so that groups only move left
    for (int64_t i = 0; i < kept; ++i) std::copy_n(keys + index_of(groups[i]) * n, n, keys + i * n);
    return kept * n;
  }

  const SlotRef in_, out_;
  const float *bias_, *factors_;  // per expert, or null
  const Routing routing_;
};

// The experts in the row of a table that belongs to the token.
class HashRoute final : public RowOp {
 public:
  HashRoute(const SlotRef& in, const SlotRef& out, const float* table, const Routing& routing)
      : in_(in), out_(out), table_(table), routing_(routing) {}
  int64_t scratch_bytes(const Run&) const override { return 4 * routing_.experts; }

 private:
  int64_t rows(const Run& run) const override { return run.batch.T; }
  int64_t row_work() const override { return 8 * routing_.experts; }
  void row(const Run& run, int64_t r, int thread) override {
    float* scores = reinterpret_cast<float*>(run.thread_scratch(thread));
    score(run, routing_.scoring, run.slots[in_.index].f32(r), routing_.experts, scores);
    const int64_t top_k = routing_.top_k;
    float *numbers = run.slots[out_.index].f32(r), *weights = numbers + top_k, sum = 0;
    std::copy_n(table_ + run.batch.source->token_ids[r] * top_k, top_k, numbers);
    std::sort(numbers, numbers + top_k);
    for (int64_t j = 0; j < top_k; ++j) sum += weights[j] = scores[int64_t(numbers[j])];
    const float whole = routing_.normalize ? sum + 1e-20f : 1.0f;
    for (int64_t j = 0; j < top_k; ++j) weights[j] = weights[j] / whole * routing_.scale;
  }
  const SlotRef in_, out_;
  const float* table_;
  const Routing routing_;
};

}  // namespace

std::unique_ptr<Op> make_hash_route(StepReader& s) {
  s.takes(1, 1, 1, 0, DSO_FLAG_SIGMOID | DSO_FLAG_SQRT_SOFTPLUS | DSO_FLAG_NORMALIZE);
  const Chosen chosen = s.chosen();
  const Routing r{chosen.experts, chosen.top_k, 1, 1, scoring(s), false, (s.step.flags & DSO_FLAG_NORMALIZE) != 0,
                  s.step.scale};
  if (!std::isfinite(r.scale)) s.refuse("scale is %g, must be finite", double(r.scale));
  const SlotRef in = s.token_rows(0, r.experts), out = s.out(0, kF32Only, 2 * r.top_k, false);
  if (out.index == in.index) s.refuse("out[0] is in[0]");
  BatchNeeds& needs = s.plan().needs;
  const int64_t ids = s.vector_size(0) / r.top_k;
  const float* table = s.vector('w', 0, ids * r.top_k);
  for (int64_t i = 0; i < ids * r.top_k; ++i)
    if (!(table[i] >= 0 && table[i] < float(r.experts)) || table[i] != std::floor(table[i]))
      s.refuse("w[0] has %g at %lld, must be a number of one of %lld experts", double(table[i]), (long long)i,
               (long long)r.experts);
  needs.vocab = needs.token_ids ? std::min(needs.vocab, ids) : ids;
  needs.token_ids = needs.ids_always = true;
  return std::make_unique<HashRoute>(in, out, table, r);
}

std::unique_ptr<Op> make_route(StepReader& s) {
  s.takes(1, 1, 1, 1, DSO_FLAG_SIGMOID | DSO_FLAG_SQRT_SOFTPLUS | DSO_FLAG_TOP2 | DSO_FLAG_NORMALIZE);
  const Chosen chosen = s.chosen();
  const Routing r{chosen.experts,
                  chosen.top_k,
                  s.positive("groups", s.step.groups),
                  s.positive("top_groups", s.step.top_groups),
                  scoring(s),
                  (s.step.flags & DSO_FLAG_TOP2) != 0,
                  (s.step.flags & DSO_FLAG_NORMALIZE) != 0,
                  s.step.scale};
  if (r.experts % r.groups) s.refuse("groups is %lld, must divide experts, %lld", (long long)r.groups, (long long)r.experts);
  if (r.top_groups > r.groups)
    s.refuse("top_groups is %lld, must be at most groups, %lld", (long long)r.top_groups, (long long)r.groups);
  if (r.top_k > r.top_groups * r.group())
    s.refuse("top_k is %lld, but top_groups %lld of %lld experts each hold fewer", (long long)r.top_k, (long long)r.top_groups,
             (long long)r.group());
  if (r.top2 && r.groups > 1 && r.group() < 2) s.refuse("the TOP2 flag needs groups of at least two experts");
  if (!std::isfinite(r.scale)) s.refuse("scale is %g, must be finite", double(r.scale));
  const SlotRef in = s.in(0, kF32Only, r.experts), out = s.out(0, kF32Only, 2 * r.top_k, in.selected);
  if (out.index == in.index) s.refuse("out[0] is in[0]");
  const float* factors = s.has_weight(0) ? s.vector('w', 0, r.experts) : nullptr;
  return std::make_unique<Route>(in, out, s.bias(0, r.experts), factors, r);
}

}  // namespace dso
