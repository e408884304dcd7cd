// A checked context: correct kernels leave its red zones intact and give bitwise equal results, and one that writes past a row
// is named.
#include "plan_fixture.hpp"

namespace {

const Kernels* whole = nullptr;

void add_too_much(const float* a, const float* b, int64_t n, float, float* out) {
  whole->add(a, b, n, out);
  out[n] = 1;
}

// A step of three tokens on its own plan. Returns dso_plan_run's code.
int32_t run(const Kernels& kernels, bool checked, std::vector<float>& logits) {
  Spec spec;
  spec.fused = false;
  Model model(spec, kernels, 2);
  check(dso_context_set_checked(model.context.c, checked) == 0, "set_checked: %s", dso_last_error());
  dso_plan* plan = nullptr;
  check(
      dso_plan_create(model.context.c, model.steps.data(), (int32_t)model.steps.size(), model.slots.data(),
                      (int32_t)model.slots.size(), model.weights.data(), (int32_t)model.weights.size(), spec.vocab, &plan) == 0,
      "plan: %s", dso_last_error());
  dso_cache cache(kernels, {spec.kv_type, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr}, 1);
  const int32_t ids[] = {1, 2, 3}, positions[] = {0, 1, 2}, query = 3, context = 0, phase = DSO_PHASE_PREFILL, table = 0,
                rows[] = {0, 1, 2};
  logits.assign(3 * (size_t)spec.vocab, NAN);
  dso_batch b{};
  b.T = b.R = 3;
  b.S = b.max_blocks = 1;
  b.token_ids = ids;
  b.positions = positions;
  b.query_len = &query;
  b.context_len = &context;
  b.phase = &phase;
  b.block_table = &table;
  b.logit_rows = rows;
  b.logits = logits.data();
  b.cache = &cache;
  int32_t rc = 0;
  for (int i = 0; i < 2; ++i) rc = dso_plan_run(plan, &b);  // the second run fills the zones again
  dso_plan_destroy(plan);
  return rc;
}

}  // namespace

int main() {
  for (const Variant& v : variants()) {
    whole = v.kernels;
    std::vector<float> plain, checked;
    check(run(*v.kernels, false, plain) == 0, "%s: %s", v.name.c_str(), dso_last_error());
    check(run(*v.kernels, true, checked) == 0, "%s, checked: %s", v.name.c_str(), dso_last_error());
    check(plain == checked, "%s: a checked plan gives other logits", v.name.c_str());
#ifndef __SANITIZE_ADDRESS__  // which would end the program there
    Kernels broken = *v.kernels;
    std::vector<ElementwiseOp> ops(broken.elementwise_ops, broken.elementwise_ops + broken.elementwise_count);
    for (ElementwiseOp& op : ops)
      if (op.op == DSO_OP_ADD) op.row = add_too_much;
    broken.elementwise_ops = ops.data();
    check(run(broken, true, checked) == DSO_ECHECK, "%s: a write past a slot was not detected", v.name.c_str());
    check(std::strstr(dso_last_error(), "(op 3) wrote byte 0 after the end of slot 0") != nullptr, "%s: %s", v.name.c_str(),
          dso_last_error());
#endif
  }
  return report("red_zones");
}
