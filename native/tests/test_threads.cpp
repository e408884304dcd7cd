// Eight threads that run one plan, while others create and destroy plans and caches and compute products on its context. For
// ThreadSanitizer (make test-native-tsan) as well as for the results.
#include <atomic>
#include <thread>

#include "plan_fixture.hpp"

namespace {

constexpr int kThreads = 8, kTokens = 40, kRounds = 3;

Sequence prompt(const Spec& spec, int number) {
  Random random(100 + (uint64_t)number);
  Sequence s;
  for (int i = 0; i < kTokens; ++i) s.tokens.push_back(random.below(spec.vocab));
  return s;
}

std::vector<std::vector<float>> logits_of(Model& model, int number) {
  Random random((uint64_t)number);
  Feeder feeder(model, 8, random);
  Sequence s = prompt(model.spec, number);
  feeder.feed({{&s, kTokens - 6, DSO_PHASE_PREFILL}});
  while (s.done < kTokens) feeder.feed({{&s, 1, DSO_PHASE_DECODE}});
  return s.logits;
}

void make_and_drop(const Model& model) {
  dso_plan* plan = nullptr;
  const int32_t rc = dso_plan_create(model.context.c, model.steps.data(), (int32_t)model.steps.size(), model.slots.data(),
                                     (int32_t)model.slots.size(), model.weights.data(), (int32_t)model.weights.size(),
                                     model.spec.vocab, &plan);
  check(rc == 0 && dso_plan_reserve(plan, 7, 7) == 0, "plan: %s", dso_last_error());
  const dso_cache_shape shape{DSO_KV_BF16, 2, 2, 16, 0, 0, 0, 0, nullptr};
  dso_cache* cache = nullptr;
  check(dso_cache_create(&shape, 4, &cache) == 0 && dso_cache_release(cache, 1) == 0, "cache: %s", dso_last_error());
  const dso_weight& head = model.weights.back();
  std::vector<float> x((size_t)head.cols, 1.0f), y((size_t)head.rows);
  check(dso_linear(model.context.c, &head, nullptr, model.spec.activation, x.data(), 1, 1, y.data()) == 0, "linear: %s",
        dso_last_error());
  dso_plan* none = nullptr;
  check(dso_plan_create(model.context.c, nullptr, 0, nullptr, 0, nullptr, 0, 1, &none) == DSO_EINVAL, "a plan of nothing");
  check(std::strstr(dso_last_error(), "steps") != nullptr, "this thread's message: %s", dso_last_error());
  dso_cache_destroy(cache);
  dso_plan_destroy(plan);
}

}  // namespace

int main() {
  const Variant best = variants().back();
  Spec spec;
  spec.format = DSO_INT8;
  spec.activation = DSO_SLOT_Q16;
  Model model(spec, *best.kernels, 2);
  std::vector<std::vector<std::vector<float>>> alone, together(kThreads);
  for (int t = 0; t < kThreads; ++t) alone.push_back(logits_of(model, t));

  std::atomic<int> running{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int r = 0; r < kRounds; ++r) together[(size_t)t] = logits_of(model, t);
      --running;
    });
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&] {
      do make_and_drop(model);
      while (running > 0);
    });
  for (std::thread& t : threads) t.join();
  for (size_t t = 0; t < kThreads; ++t) check(alone[t] == together[t], "thread %zu: other logits than alone", t);
  return report("threads");
}
