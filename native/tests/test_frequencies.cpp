// ROPE_TABLE with the plan's frequencies and with those of each sequence: every row against the formula, whatever other
// sequences the batch has.
#include <cmath>
#include <cstring>

#include "plan_parts.hpp"
#include "scalar_kernels.hpp"

namespace {

std::vector<float> frequencies_of(int64_t count, Random& random) {
  std::vector<float> found((size_t)count);
  for (float& f : found) f = (float)random.below(1000) / 999.0f;
  return found;
}

struct Table {
  Table(const Kernels& kernels, int threads, int32_t half, const float* inv_freq, int32_t tables)
      : context{std::make_shared<Context>(kernels, threads)} {
    const dso_slot slot{DSO_SLOT_F32, 2 * half, 0, 0};
    const dso_weight weight{DSO_VECTOR, 1, half, 0, inv_freq, 4 * half};
    std::vector<dso_slot> slots((size_t)tables, slot);
    std::vector<dso_step> steps;
    for (int32_t i = 0; i < tables; ++i) {
      steps.push_back(step_of(DSO_OP_ROPE_TABLE, {}, {i}, {0}));
      steps.back().scale = 1.5f;
    }
    steps.push_back(step_of(DSO_OP_HIDDEN_OUT, {0}, {}));
    check(dso_plan_create(&context, steps.data(), tables + 1, slots.data(), tables, &weight, 1, 8, &plan) == 0, "plan: %s",
          dso_last_error());
  }
  ~Table() { dso_plan_destroy(plan); }
  dso_context context;
  dso_plan* plan = nullptr;
};

void rows(const Kernels& kernels, int32_t half, int threads) {
  Random random(half + threads);
  const std::vector<float> own = frequencies_of(half, random);
  const Table table(kernels, threads, half, own.data(), 1);
  for (int round = 0; round < 20; ++round) {
    const int32_t S = 1 + random.below(9);
    std::vector<int32_t> query, context((size_t)S), phase((size_t)S), positions, owner;
    for (int32_t s = 0; s < S; ++s) {
      query.push_back(1 + random.below(s % 2 ? 3 : 40));
      for (int32_t t = 0; t < query.back(); ++t) {
        owner.push_back(s);
        positions.push_back(random.below(100000));
      }
    }
    const int32_t T = (int32_t)owner.size();
    const std::vector<float> given = frequencies_of((int64_t)S * half, random);
    std::vector<float> found((size_t)T * 2 * (size_t)half, NAN);
    dso_batch b{};
    b.T = T, b.S = S, b.positions = positions.data(), b.query_len = query.data(), b.context_len = context.data(),
    b.phase = phase.data();
    b.hidden = found.data();
    b.inv_freq = round % 3 ? given.data() : nullptr;
    check(dso_plan_run(table.plan, &b) == 0, "run: %s", dso_last_error());
    for (int32_t t = 0; t < T; ++t)
      for (int32_t i = 0; i < half; ++i) {
        const float angle =
            (float)positions[(size_t)t] * (b.inv_freq ? given[(size_t)(owner[(size_t)t] * half + i)] : own[(size_t)i]);
        const float* row = found.data() + (size_t)t * 2 * (size_t)half;
        const float cosine = (float)std::cos((double)angle) * 1.5f, sine = (float)std::sin((double)angle) * 1.5f;
        if (row[i] != cosine || row[half + i] != sine) {
          check(false, "%s: row %d of %d, sequence %d of %d, number %d of %d", kernels.isa, t, T, owner[(size_t)t], S, i, half);
          return;
        }
      }
  }
}

void refused() {
  const float own[] = {1.0f, 0.5f};
  const Table two(scalar::table, 1, 2, own, 2);
  const int32_t position[] = {3}, query[] = {1}, zero[] = {0};
  std::vector<float> found(4, 123.0f);
  dso_batch b{};
  b.T = b.S = 1, b.positions = position, b.query_len = query, b.context_len = b.phase = zero, b.hidden = found.data();
  check(dso_plan_run(two.plan, &b) == 0, "two tables of the plan's own: %s", dso_last_error());
  std::fill(found.begin(), found.end(), 123.0f);
  b.inv_freq = own;
  check(
      dso_plan_run(two.plan, &b) == DSO_EINVAL && strstr(dso_last_error(), "inv_freq needs a plan with one ROPE_TABLE, not 2"),
      "got: %s", dso_last_error());
  check(found[0] == 123.0f, "wrote before it refused");
}

}  // namespace

int main() {
  for (int32_t half : {1, 8, 37})
    for (int threads : {1, 3}) {
      rows(scalar::table, half, threads);
#ifndef DSO_SCALAR_ONLY
      for (const Variant& v : vector_variants()) rows(*v.kernels, half, threads);
#endif
    }
  refused();
  return report("test_frequencies");
}
