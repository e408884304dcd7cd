// Routes on every variant against a plain implementation of Transformers' routers in double: which experts, their weights,
// ties, groups, NaN and infinities; the same bits whatever other rows; and every error in the steps of experts by name.
#include "scalar_kernels.hpp"
// After check.hpp, whose size functions are an independent implementation of the layout.
#include "experts_fixture.hpp"

namespace {

struct Spec {
  int32_t experts, top_k, groups, top_groups, flags;
  bool bias, factors = false;  // factors: the same vector, as w0
};
constexpr int32_t kV2 = 0, kV3 = DSO_FLAG_SIGMOID | DSO_FLAG_TOP2 | DSO_FLAG_NORMALIZE;
constexpr float kScale = 2.5f;

// scores -> routes as a plan: scores are the batch's embeddings, routes a hidden state.
class Router {
 public:
  Router(const Spec& spec, const std::vector<float>& bias, const Kernels& kernels, int threads)
      : spec_(spec), context_(kernels, threads), bias_(bias), embed_(::packed_bytes(DSO_F32, 1, spec.experts), 0) {
    const dso_slot slots[] = {{DSO_SLOT_F32, spec.experts, 0, 0}, {DSO_SLOT_F32, 2 * spec.top_k, 0, 0}};
    const dso_weight weights[] = {{DSO_F32, 1, spec.experts, 0, embed_.get(), (int64_t)embed_.size()},
                                  {DSO_VECTOR, 1, spec.experts, 0, bias_.data(), 4 * (int64_t)bias_.size()}};
    dso_step steps[] = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0}),
                        step_of(DSO_OP_ROUTE, {0}, {1}, {spec.factors ? 1 : -1}, {spec.bias ? 1 : -1}),
                        step_of(DSO_OP_HIDDEN_OUT, {1}, {})};
    steps[1].flags = spec.flags, steps[1].experts = spec.experts, steps[1].top_k = spec.top_k;
    steps[1].groups = spec.groups, steps[1].top_groups = spec.top_groups, steps[1].scale = kScale;
    check(dso_plan_create(context_.c, steps, 3, slots, 2, weights, 2, 1, &plan_) == 0, "plan: %s", dso_last_error());
  }
  ~Router() { dso_plan_destroy(plan_); }
  Router(const Router&) = delete;

  std::vector<float> operator()(const float* scores, int32_t T) {
    const int32_t context = 0, phase = DSO_PHASE_PREFILL;
    std::vector<float> routes((size_t)T * 2 * (size_t)spec_.top_k, NAN);
    dso_batch b{};
    b.T = T;
    b.S = 1;
    b.query_len = &T;
    b.context_len = &context;
    b.phase = &phase;
    b.inputs_embeds = scores;
    b.hidden = routes.data();
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    return routes;
  }

 private:
  const Spec spec_;
  OwnContext context_;
  const std::vector<float> bias_;
  Buffer embed_;
  dso_plan* plan_ = nullptr;
};

// NaN ranks highest; ties go to the lower index.
bool before(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }
std::vector<int> best(const std::vector<double>& values, int n) {
  std::vector<int> order;
  for (int i = 0; i < (int)values.size(); ++i) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return before(values[(size_t)a], values[(size_t)b]); });
  order.resize((size_t)n);
  std::sort(order.begin(), order.end());
  return order;
}

struct Expected {
  std::vector<double> scores, choice;
  std::vector<int> chosen;
  bool close;  // a choice nearer than fp32 tells apart
};
Expected expect(const Spec& s, const float* x, const std::vector<float>& bias) {
  Expected e{{}, {}, {}, false};
  double sum = 0, top = -INFINITY;
  for (int i = 0; i < s.experts; ++i) top = std::max(top, (double)x[i]);
  for (int i = 0; i < s.experts; ++i) {
    e.scores.push_back(s.flags & DSO_FLAG_SIGMOID ? 1 / (1 + std::exp(-(double)x[i])) : std::exp(x[i] - top));
    sum += e.scores.back();
  }
  if (!(s.flags & DSO_FLAG_SIGMOID))
    for (double& v : e.scores) v /= sum;
  for (int i = 0; i < s.experts; ++i) e.choice.push_back(e.scores[(size_t)i] + (s.bias ? bias[(size_t)i] : 0));
  const int n = s.experts / s.groups;
  auto near = [&](const std::vector<double>& values, int kept) {  // the last kept and the first that is not
    std::vector<double> sorted = values;
    std::stable_sort(sorted.begin(), sorted.end(), before);
    return kept < (int)sorted.size() && sorted[(size_t)kept - 1] != sorted[(size_t)kept] &&
           std::fabs(sorted[(size_t)kept - 1] - sorted[(size_t)kept]) < 1e-6;
  };
  std::vector<double> candidates = e.choice;
  if (s.groups > 1) {
    std::vector<double> groups;
    for (int g = 0; g < s.groups; ++g) {
      std::vector<double> in(e.choice.begin() + g * n, e.choice.begin() + (g + 1) * n);
      std::stable_sort(in.begin(), in.end(), before);
      groups.push_back(s.flags & DSO_FLAG_TOP2 ? in[0] + in[1] : in[0]);
    }
    e.close |= near(groups, s.top_groups);
    const std::vector<int> kept = best(groups, s.top_groups);
    for (int i = 0; i < s.experts; ++i)
      if (!std::binary_search(kept.begin(), kept.end(), i / n)) candidates[(size_t)i] = -INFINITY;
  }
  e.close |= near(candidates, s.top_k);
  e.chosen = best(candidates, s.top_k);
  return e;
}

void compare(const Spec& s, const Kernels& k, const std::vector<float>& x, const std::vector<float>& bias, int32_t T,
             int threads, bool exact_ties) {
  Router router(s, bias, k, threads);
  const std::vector<float> all = router(x.data(), T);
  int told = 0;
  for (int32_t t = 0; t < T; ++t) {
    const float *row = x.data() + (size_t)t * (size_t)s.experts, *routes = all.data() + (size_t)t * 2 * (size_t)s.top_k;
    check(memcmp(router(row, 1).data(), routes, 8 * (size_t)s.top_k) == 0, "%s: row %d differs in a batch", k.isa, t);
    const Expected e = expect(s, row, bias);
    if (e.close && !exact_ties) continue;
    ++told;
    double sum = 1e-20;
    for (int c : e.chosen) sum += e.scores[(size_t)c];
    for (int j = 0; j < s.top_k; ++j) {
      if (!check(routes[j] == (float)e.chosen[(size_t)j],
                 "%s, %d of %d, groups %d of %d, flags %d: row %d chooses %g as its %d-th, not %d", k.isa, s.top_k, s.experts,
                 s.top_groups, s.groups, s.flags, t, routes[j], j, e.chosen[(size_t)j]))
        return;
      const double factor = s.factors ? bias[(size_t)e.chosen[(size_t)j]] : 1;
      const double want = e.scores[(size_t)e.chosen[(size_t)j]] / (s.flags & DSO_FLAG_NORMALIZE ? sum : 1) * kScale * factor,
                   got = routes[s.top_k + j];
      const bool both_nan = std::isnan(want) && std::isnan(got);
      check(both_nan || std::fabs(got - want) <= 2e-6 * std::fabs(want) + 1e-37, "%s, flags %d: row %d, weight %d: %g, not %g",
            k.isa, s.flags, t, j, got, want);
    }
  }
  check(told > T / 2, "%d of %d rows were too close to tell", T - told, T);
}

const Spec kSpecs[] = {
    {64, 6, 1, 1, kV2, false},
    {160, 6, 8, 3, kV2, false},
    {256, 8, 8, 4, kV3, true},
    {16, 4, 4, 2, kV3, true},
    {1, 1, 1, 1, kV2, false},
    {3, 3, 1, 1, kV3, false},
    {37, 5, 1, 1, DSO_FLAG_SIGMOID, true},
    {35, 10, 7, 2, kV2, false},
    {12, 4, 6, 2, kV3, true},
    {12, 3, 12, 3, kV2, true},
    {1000, 100, 10, 5, DSO_FLAG_NORMALIZE, true},
    {37, 5, 1, 1, DSO_FLAG_NORMALIZE, false, true},
};

void random_scores(const Kernels& k, int threads) {
  Random random(5);
  for (const Spec& s : kSpecs) {
    const int32_t T = s.experts > 200 ? 40 : 100;
    std::vector<float> x((size_t)(T * s.experts)), bias((size_t)s.experts);
    for (float& v : x) v = 2 * random.normal();
    for (float& v : bias) v = 0.2f * random.normal();
    compare(s, k, x, bias, T, threads, false);
  }
}

void ties_and_broken_scores(const Kernels& k) {
  Random random(6);
  for (const Spec& s : kSpecs) {
    const int32_t T = 30;
    std::vector<float> x((size_t)(T * s.experts)), bias((size_t)s.experts, 0.0f);
    for (float& v : x) v = random.below(2) ? 1.0f : -0.0f;  // few values: ties everywhere, zeros of both signs among them
    for (float& v : x)
      if (!random.below(3)) v = 0;
    compare(s, k, x, bias, T, 2, true);
    for (int32_t t = 0; t < T; ++t) {
      const float broken[] = {NAN, -NAN, INFINITY, -INFINITY};
      for (int n = t % 3; n >= 0; --n) x[(size_t)(t * s.experts + random.below(s.experts))] = broken[random.below(4)];
    }
    compare(s, k, x, bias, T, 2, true);
    bias[0] = NAN;
    compare({s.experts, s.top_k, s.groups, s.top_groups, s.flags, true}, k, x, bias, T, 2, true);
  }
}

// A step of experts with one invalid field is rejected, and the message names it.
void mistakes() {
  MoeSpec spec{72, 40, 8, 2, DSO_INT4, DSO_SLOT_Q8, DSO_INT4, DSO_SLOT_Q8};
  OwnContext context(*variants()[0].kernels, 1);
  MoeWeights weights(spec, random_matrices(context.c));
  Moe moe(spec, weights, *variants()[0].kernels, 1);
  auto refused =
      [&](const char* words,
          const std::function<void(std::vector<dso_step>&, std::vector<dso_slot>&, std::vector<dso_weight>&)>& change) {
        std::vector<dso_step> steps = moe.steps();
        std::vector<dso_slot> slots = moe.slots();
        std::vector<dso_weight> table = weights.table(spec);
        change(steps, slots, table);
        dso_plan* plan = nullptr;
        const int32_t rc = dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots.data(), (int32_t)slots.size(),
                                           table.data(), (int32_t)table.size(), 1, &plan);
        check(rc == DSO_EINVAL && strstr(dso_last_error(), words), "code %d, message \"%s\", expected \"%s\"", rc,
              dso_last_error(), words);
        if (!rc) dso_plan_destroy(plan);
      };
  auto at = [](std::vector<dso_step>& steps, int32_t op) -> dso_step& {
    return *std::find_if(steps.begin(), steps.end(), [&](const dso_step& s) { return s.op == op; });
  };
  auto step = [&](const char* words, int32_t op, const std::function<void(dso_step&)>& change) {
    refused(words, [&](auto& steps, auto&, auto&) { change(at(steps, op)); });
  };
  for (int32_t op : {DSO_OP_ROUTE, DSO_OP_EXPERTS_GATE_UP, DSO_OP_EXPERTS_DOWN}) {
    step("experts is 0", op, [](dso_step& s) { s.experts = 0; });
    step("experts is 99999", op, [](dso_step& s) { s.experts = 99999; });
    step("top_k is 0", op, [](dso_step& s) { s.top_k = 0; });
    step("top_k is 9, must be from 1 to experts, 8", op, [](dso_step& s) { s.top_k = 9; });
    step("flags are", op, [](dso_step& s) { s.flags |= DSO_FLAG_EAGER; });
  }
  step("groups is 0", DSO_OP_ROUTE, [](dso_step& s) { s.groups = 0; });
  step("groups is 3, must divide experts, 8", DSO_OP_ROUTE, [](dso_step& s) { s.groups = 3; });
  step("top_groups is 2, must be at most groups, 1", DSO_OP_ROUTE, [](dso_step& s) { s.top_groups = 2; });
  step("top_k is 2, but top_groups 1 of 1 experts", DSO_OP_ROUTE, [](dso_step& s) { s.groups = 8; });
  step("groups of at least two experts", DSO_OP_ROUTE,
       [](dso_step& s) { s.groups = s.top_groups = 8, s.flags |= DSO_FLAG_TOP2; });
  step("scale is nan", DSO_OP_ROUTE, [](dso_step& s) { s.scale = NAN; });
  step("in[0] must have width 7", DSO_OP_ROUTE, [](dso_step& s) { s.experts = 7; });
  step("out[0] must have width 6", DSO_OP_ROUTE, [](dso_step& s) { s.top_k = 3; });
  step("in[1] must have width 6", DSO_OP_EXPERTS_GATE_UP, [](dso_step& s) { s.top_k = 3; });
  step("a stack of 16 matrices, must be 14", DSO_OP_EXPERTS_GATE_UP, [](dso_step& s) { s.experts = 7; });
  step("a stack of 8 matrices, must be 7", DSO_OP_EXPERTS_DOWN, [](dso_step& s) { s.experts = 7; });
  step("offset is 5 and experts 8, must be a part of groups, 12", DSO_OP_EXPERTS_GATE_UP,
       [](dso_step& s) { s.groups = 12, s.offset = 5; });
  step("top_k is 13, must be from 1 to groups, 12", DSO_OP_EXPERTS_DOWN, [](dso_step& s) { s.groups = 12, s.top_k = 13; });
  step("no earlier EXPERTS_GATE_UP", DSO_OP_EXPERTS_DOWN, [](dso_step& s) { s.flags = 0; });
  step("which INT4 weights do not support", DSO_OP_EXPERTS_GATE_UP, [](dso_step& s) { s.in[0] = 0; });
  refused("1 rows per token, must have 2",
          [&](auto& steps, auto& slots, auto&) { slots[(size_t)at(steps, DSO_OP_EXPERTS_GATE_UP).out[0]].repeat = 1; });
  refused("must have width 40",
          [&](auto& steps, auto& slots, auto&) { slots[(size_t)at(steps, DSO_OP_EXPERTS_GATE_UP).out[0]].width = 41; });
  refused("must be 1 x 8", [](auto&, auto&, auto& table) { table[4].cols = 7; });
  refused("in[0] must have width 73",
          [](auto&, auto&, auto& table) { table[2].cols = 73; });  // as many tiles, so as many bytes
  refused("repeat is 5000", [&](auto&, auto& slots, auto&) { slots[1].repeat = 5000; });
}

}  // namespace

int main() {
  for (const Variant& v : variants())
    for (int threads : {1, 3}) random_scores(*v.kernels, threads);
  for (const Variant& v : variants()) ties_and_broken_scores(*v.kernels);
  mistakes();
  return report("test_route");
}
