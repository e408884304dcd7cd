// Shared by tests of groups: a plan that exchanges rows, and numbers whose sums depend on the order.
#pragma once
#include <chrono>

#include "isa.hpp"
#include "plan_parts.hpp"

inline float element(int rank, int64_t row, int64_t i) { return float(rank + 1) * 0.1f + float(row * 31 + i % 97) * 0.001f; }

// A plan that reads one part per rank, sums them or joins them, and returns the result as hidden state 0.
struct Exchange {
  OwnContext context;
  dso_plan* plan = nullptr;
  const int32_t width, own, begin;
  Exchange(dso_group* g, int rank, int ranks, bool joins, int32_t width, int32_t each, int threads)
      : context(kernels_here(), threads),
        width(width),
        own(!joins             ? width
            : rank + 1 < ranks ? each
                               : width - each * (ranks - 1)),
        begin(joins ? rank * each : 0) {
    check(dso_context_join(context.c, g) == 0, "join: %s", dso_last_error());
    const dso_slot slots[] = {{DSO_SLOT_F32, own, 0, 0}, {DSO_SLOT_F32, width, 0, 0}};
    std::vector<dso_step> steps{step_of(DSO_OP_STATE_IN, {}, {0}), step_of(DSO_OP_PUBLISH, {0}, {})};
    steps.push_back(step_of(joins ? DSO_OP_JOIN_PARTS : DSO_OP_SUM_PARTS, {}, {1}));
    steps.back().offset = joins ? each : 0;
    steps.push_back(step_of(DSO_OP_HIDDEN_OUT, {1}, {}));
    steps.back().flags = DSO_FLAG_LAST;
    check(dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots, 2, nullptr, 0, 1, &plan) == 0, "plan: %s",
          dso_last_error());
  }
  ~Exchange() { dso_plan_destroy(plan); }
  static const Kernels& kernels_here() { return choose_kernels(nullptr); }
  // seconds: of the plan alone.
  int32_t run(int rank, int32_t rows, std::vector<float>& result, double* seconds = nullptr) const {
    std::vector<float> part((size_t)rows * own), logits;
    result.assign((size_t)rows * width, 0);
    std::vector<int32_t> zeros((size_t)rows), one{rows}, none{0}, prefill{DSO_PHASE_PREFILL};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < own; ++i) part[size_t(r * own + i)] = element(rank, r, begin + i);
    dso_batch b{};
    b.T = rows;
    b.S = 1;
    b.token_ids = zeros.data();
    b.positions = zeros.data();
    b.query_len = one.data();
    b.context_len = none.data();
    b.phase = prefill.data();
    b.states = part.data();
    b.last_hidden = result.data();
    const auto start = std::chrono::steady_clock::now();
    const int32_t code = dso_plan_run(plan, &b);
    if (seconds) *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return code;
  }
};
