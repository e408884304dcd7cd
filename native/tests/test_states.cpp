// What MTP layers need in addition: STATE_IN, CONCAT to every kind of row, and the last hidden state alone.
#include <numeric>

#include "cache.hpp"
#include "plan_parts.hpp"
#include "scalar_kernels.hpp"

namespace {

struct Case {
  const char* name;
  int32_t format, slot;
};

// logits = W [embedding, state]: against dso_linear of the rows concatenated here.
void rows_side_by_side(const Kernels& kernels, const Case& c, int32_t H, int32_t T, int threads) {
  Random random(uint64_t(H * 100 + T));
  dso_context context{std::make_shared<Context>(kernels, threads)};
  const int32_t V = 37;
  std::vector<std::unique_ptr<Buffer>> keep;
  const std::vector<float> embed = normal((size_t)(V * H), 1, random), head = normal((size_t)(V * 2 * H), 1, random);
  const dso_weight weights[] = {packed_weight(&context, DSO_F32, embed, 0, V, H, keep),
                                packed_weight(&context, c.format, head, 0, V, 2 * H, keep)};
  const dso_slot slots[] = {{DSO_SLOT_F32, H, 0, 0},
                            {DSO_SLOT_F32, H, 0, 0},
                            {c.slot, 2 * H, 0, 0},
                            {DSO_SLOT_F32, V, 0, 0},
                            {DSO_SLOT_LOGITS, V, 1, 0}};
  std::vector<dso_step> steps = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0}), step_of(DSO_OP_STATE_IN, {}, {1}),
                                 step_of(DSO_OP_HIDDEN_OUT, {0}, {}),     step_of(DSO_OP_HIDDEN_OUT, {1}, {}),
                                 step_of(DSO_OP_CONCAT, {0, 1}, {2}),     step_of(DSO_OP_LINEAR, {2}, {3}, {1}),
                                 step_of(DSO_OP_DRAFT_OUT, {1}, {}),      step_of(DSO_OP_SELECT_ROWS, {3}, {4})};
  steps[3].layer = 1;
  steps[3].flags = DSO_FLAG_LAST;
  dso_plan* plan = nullptr;
  if (!check(dso_plan_create(&context, steps.data(), (int32_t)steps.size(), slots, 5, weights, 2, V, &plan) == 0, "plan: %s",
             dso_last_error()))
    return;

  std::vector<int32_t> ids((size_t)T), rows((size_t)T);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> states((size_t)(T * H)), both((size_t)(2 * T * H)), expected((size_t)(T * V)), found(expected.size(), NAN);
  for (float& v : states) v = random.normal();
  for (int32_t t = 0; t < T; ++t) {
    ids[(size_t)t] = random.below(V);
    std::copy_n(embed.begin() + (long)ids[(size_t)t] * H, H, both.begin() + (long)t * 2 * H);
    std::copy_n(states.begin() + (long)t * H, H, both.begin() + (long)t * 2 * H + H);
  }
  check(dso_linear(&context, &weights[1], nullptr, c.slot, both.data(), T, T, expected.data()) == 0, "linear: %s",
        dso_last_error());

  const int32_t query[] = {T}, context_len[] = {0}, phase[] = {DSO_PHASE_DECODE};
  dso_batch b{};
  b.T = b.R = T;
  b.S = 1;
  b.token_ids = ids.data();
  b.query_len = query;
  b.context_len = context_len;
  b.phase = phase;
  b.logit_rows = rows.data();
  b.logits = found.data();
  check(dso_plan_run(plan, &b) == DSO_EINVAL && strstr(dso_last_error(), "batch.states is NULL"), "no states: %s",
        dso_last_error());
  b.states = states.data();
  // Hidden states: none, only the last, all, both; each without and with draft states.
  for (int asked = 0; asked < 8; ++asked) {
    std::vector<float> last(states.size(), NAN), all(2 * states.size(), NAN), drafts(states.size(), NAN);
    b.draft_states = asked & 4 ? drafts.data() : nullptr;
    b.last_hidden = asked & 1 ? last.data() : nullptr;
    b.hidden = asked & 2 ? all.data() : nullptr;
    std::fill(found.begin(), found.end(), NAN);
    check(dso_plan_run(plan, &b) == 0, "run: %s", dso_last_error());
    check(memcmp(found.data(), expected.data(), 4 * found.size()) == 0, "%s, %s, %d wide, %d rows: not the rows side by side",
          kernels.isa, c.name, H, T);
    if (asked & 1) check(last == states, "%s: last_hidden is not the last state", kernels.isa);
    if (asked & 4) check(drafts == states, "%s: draft_states are not the input of DRAFT_OUT", kernels.isa);
    if (asked & 2)
      check(std::equal(states.begin(), states.end(), all.begin() + T * H), "%s: hidden state 1 is another", kernels.isa);
  }
  dso_plan_destroy(plan);
}

void refused() {
  dso_context context{std::make_shared<Context>(scalar::table, 1)};
  const dso_slot slots[] = {{DSO_SLOT_F32, 8, 0, 0}, {DSO_SLOT_F32, 15, 0, 0}, {DSO_SLOT_LOGITS, 8, 1, 0}};
  auto refuse = [&](const dso_step& second, const char* says) {
    const dso_step steps[] = {step_of(DSO_OP_STATE_IN, {}, {0}), second};
    dso_plan* plan = nullptr;
    check(dso_plan_create(&context, steps, 2, slots, 3, nullptr, 0, 8, &plan) == DSO_EINVAL && strstr(dso_last_error(), says),
          "got: %s", dso_last_error());
  };
  refuse(step_of(DSO_OP_CONCAT, {0, 0}, {1}), "out[0] must have width 16");
  refuse(step_of(DSO_OP_CONCAT, {0, 1}, {2}), "slot 1, which no earlier step writes");
  refuse(step_of(DSO_OP_STATE_IN, {0}, {1}), "must be -1");
  refuse(step_of(DSO_OP_DRAFT_OUT, {0}, {1}), "must be -1");
  refuse(step_of(DSO_OP_DRAFT_OUT, {1}, {}), "slot 1, which no earlier step writes");
}

}  // namespace

int main() {
  const Case cases[] = {{"f32", DSO_F32, DSO_SLOT_F32},
                        {"bf16", DSO_BF16, DSO_SLOT_BF16},
                        {"int8", DSO_INT8, DSO_SLOT_Q16},
                        {"int4", DSO_INT4, DSO_SLOT_Q8}};
  auto all = [](const Kernels& k, const Case& c) {
    for (int32_t H : {8, 33, 200})
      for (int32_t T : {1, 5, 70})
        for (int threads : {1, 3}) rows_side_by_side(k, c, H, T, threads);
  };
  all(scalar::table, cases[0]);  // it has F32 only
#ifndef DSO_SCALAR_ONLY
  for (const Variant& v : variants())
    for (const Case& c : cases) all(*v.kernels, c);
#endif
  refused();
  return report("test_states");
}
