// A mixture of experts as a plan, for tests and benchmarks: x (a batch's embeddings) -> scores -> routes -> experts -> hidden
// states, which hold y and the routes.
#pragma once
#include <functional>

#include "plan_parts.hpp"

struct MoeSpec {
  int32_t hidden, inner, experts, top_k;
  int32_t up_format = DSO_F32, up_kind = DSO_SLOT_F32, down_format = DSO_F32, down_kind = DSO_SLOT_F32;
  bool grouped = true;
  int32_t groups = 1, top_groups = 1, flags = DSO_FLAG_SIGMOID | DSO_FLAG_NORMALIZE;
  float alpha = 1, limit = 0;  // limit > 0: experts with biases and a clamped SwiGLU
  bool weighs = false;         // weights multiply the inputs
};

// Weights of one layer, used by plans on any context.
class MoeWeights {
 public:
  using Fill = std::function<void(int32_t format, int32_t rows, int32_t cols, uint8_t* packed)>;  // one matrix
  MoeWeights(const MoeSpec& s, const Fill& fill, uint64_t seed = 1)
      : gate_up(stack(s.up_format, s.inner, s.hidden, 2 * s.experts, fill)),
        down(stack(s.down_format, s.hidden, s.inner, s.experts, fill)),
        router(::packed_bytes(DSO_F32, s.experts, s.hidden), 0),
        embed(::packed_bytes(DSO_F32, 1, s.hidden), 0),
        bias((size_t)s.experts),
        up_bias(2 * (size_t)s.experts * (size_t)s.inner),
        down_bias((size_t)s.experts * (size_t)s.hidden) {
    Random random(seed);
    for (int32_t e = 0; e < s.experts; ++e)
      for (int32_t c = 0; c < s.hidden; ++c)  // tiles of [32 columns][16 rows]
        ((float*)router.get())[(e / 16 * ((s.hidden + 31) / 32) + c / 32) * 512 + c % 32 * 16 + e % 16] =
            random.normal() / std::sqrt((float)s.hidden);
    for (std::vector<float>* biases : {&bias, &up_bias, &down_bias})
      for (float& b : *biases) b = 0.1f * random.normal();
  }
  std::vector<dso_weight> table(const MoeSpec& s) {
    return {{DSO_F32, 1, s.hidden, 0, embed.get(), (int64_t)embed.size()},
            {DSO_F32, s.experts, s.hidden, 0, router.get(), (int64_t)router.size()},
            {s.up_format, s.inner, s.hidden, 2 * s.experts, gate_up->get(), (int64_t)gate_up->size()},
            {s.down_format, s.hidden, s.inner, s.experts, down->get(), (int64_t)down->size()},
            vector(bias),
            vector(up_bias),
            vector(down_bias)};
  }
  std::unique_ptr<Buffer> gate_up, down;
  Buffer router, embed;
  std::vector<float> bias, up_bias, down_bias;

 private:
  static dso_weight vector(std::vector<float>& v) {
    return {DSO_VECTOR, 1, (int32_t)v.size(), 0, v.data(), 4 * (int64_t)v.size()};
  }
  static std::unique_ptr<Buffer> stack(int32_t format, int32_t rows, int32_t cols, int32_t count, const Fill& fill) {
    const size_t one = ::packed_bytes(format, rows, cols);
    auto all = std::make_unique<Buffer>(one * (size_t)count);
    for (int32_t i = 0; i < count; ++i) fill(format, rows, cols, all->get() + one * (size_t)i);
    return all;
  }
};

inline MoeWeights::Fill random_matrices(dso_context* c, uint64_t seed = 3) {
  auto random = std::make_shared<Random>(seed);
  return [=](int32_t format, int32_t rows, int32_t cols, uint8_t* packed) {
    std::vector<float> w((size_t)rows * (size_t)cols);
    for (float& v : w) v = random->normal() / std::sqrt((float)cols);
    check(dso_pack(c, format, DSO_SRC_F32, w.data(), rows, cols, cols, nullptr, packed) == 0, "pack: %s", dso_last_error());
  };
}

class Moe {
 public:
  Moe(const MoeSpec& spec, MoeWeights& weights, const Kernels& kernels, int threads)
      : spec(spec), context_(kernels, threads), weights_(weights.table(spec)) {
    const int32_t x = slot(DSO_SLOT_F32, spec.hidden), scores = slot(DSO_SLOT_F32, spec.experts),
                  routes = slot(DSO_SLOT_F32, 2 * spec.top_k);
    const int32_t h = slot(spec.down_kind, spec.inner, spec.top_k), y = slot(DSO_SLOT_F32, spec.hidden);
    add(DSO_OP_EMBEDDING, {}, x, 0);
    add(DSO_OP_LINEAR, {x}, scores, 1);
    dso_step& route = add(DSO_OP_ROUTE, {scores}, routes, -1);
    route.b[0] = 4;
    route.flags = spec.flags;
    int32_t read = x;
    if (spec.up_kind != DSO_SLOT_F32) add(DSO_OP_CONVERT, {x}, read = slot(spec.up_kind, spec.hidden), -1);
    dso_step &gate_up = add(DSO_OP_EXPERTS_GATE_UP, {read, routes}, h, 2), &down = add(DSO_OP_EXPERTS_DOWN, {h, routes}, y, 3);
    gate_up.flags = down.flags = (spec.grouped ? DSO_FLAG_GROUPED : 0) | (spec.weighs ? DSO_FLAG_WEIGH_INPUT : 0);
    if (spec.limit > 0) {
      gate_up.b[0] = 5;
      down.b[0] = 6;
      gate_up.scale = spec.alpha;
      gate_up.softcap = spec.limit;
    }
    add(DSO_OP_HIDDEN_OUT, {y}, -1, -1);
    add(DSO_OP_HIDDEN_OUT, {routes}, -1, -1).layer = routes_at();
    const int32_t rc = dso_plan_create(context_.c, steps_.data(), (int32_t)steps_.size(), slots_.data(), (int32_t)slots_.size(),
                                       weights_.data(), (int32_t)weights_.size(), 1, &plan_);
    if (rc) {
      fprintf(stderr, "plan: %s\n", dso_last_error());
      abort();
    }
  }
  ~Moe() { dso_plan_destroy(plan_); }
  Moe(const Moe&) = delete;

  struct Out {
    std::vector<float> y, routes;  // [T, hidden], [T, 2 * top_k]
  };
  // Each of the first `decode` rows is a sequence in decode phase; the others are one sequence in prefill phase.
  Out run(const std::vector<float>& x, int32_t T, int32_t decode) {
    std::vector<int32_t> query((size_t)decode, 1), phase((size_t)decode, DSO_PHASE_DECODE);
    if (decode < T) {
      query.push_back(T - decode);
      phase.push_back(DSO_PHASE_PREFILL);
    }
    const std::vector<int32_t> zeros((size_t)T);
    const size_t width = 2 * (size_t)spec.top_k, before = (size_t)T * width * (size_t)routes_at();
    hidden_.assign(before + (size_t)T * width, NAN);
    dso_batch b{};
    b.T = T;
    b.S = (int32_t)query.size();
    b.query_len = query.data();
    b.context_len = zeros.data();
    b.phase = phase.data();
    b.inputs_embeds = x.data();
    b.hidden = hidden_.data();
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    return {{hidden_.begin(), hidden_.begin() + (long)T * spec.hidden}, {hidden_.begin() + (long)before, hidden_.end()}};
  }
  dso_plan* plan() { return plan_; }
  const std::vector<dso_step>& steps() const { return steps_; }
  const std::vector<dso_slot>& slots() const { return slots_; }

  const MoeSpec spec;

 private:
  int32_t routes_at() const { return (spec.hidden + 2 * spec.top_k - 1) / (2 * spec.top_k); }  // after y, in rows of routes
  int32_t slot(int32_t kind, int32_t width, int32_t repeat = 1) {
    slots_.push_back({kind, width, 0, repeat});
    return (int32_t)slots_.size() - 1;
  }
  dso_step& add(int32_t op, const std::vector<int32_t>& in, int32_t out, int32_t weight) {
    dso_step s = step_of(op, in, {out}, {weight});
    if (op == DSO_OP_ROUTE) s.scale = 2.5f, s.groups = spec.groups, s.top_groups = spec.top_groups;
    s.experts = spec.experts;
    s.top_k = spec.top_k;
    steps_.push_back(s);
    return steps_.back();
  }

  OwnContext context_;
  std::vector<dso_weight> weights_;
  std::vector<dso_slot> slots_;
  std::vector<dso_step> steps_ = reserved();
  std::vector<float> hidden_;
  dso_plan* plan_ = nullptr;

  static std::vector<dso_step> reserved() {  // references returned by add() stay valid
    std::vector<dso_step> steps;
    steps.reserve(16);
    return steps;
  }
};
