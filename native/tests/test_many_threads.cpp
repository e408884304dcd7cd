// Many more threads than CPUs: the results of one thread, and every step ends. Also counts the hand-overs of a step.
//   test_many_threads [steps]
#include "plan_fixture.hpp"

namespace {

constexpr int kThreads = 128;

std::vector<std::vector<float>> run(Model& model, int steps, std::vector<int64_t>* handovers) {
  Random random(3);
  std::vector<std::vector<float>> logits;
  for (int step = 0; step < steps;) {
    Sequence s;
    for (int i = 0; i < 64; ++i) s.tokens.push_back(random.below(model.spec.vocab));
    Random blocks(4);
    Feeder feeder(model, 4, blocks);
    feeder.feed({{&s, 20, DSO_PHASE_PREFILL}});
    for (; s.done < 64 && step < steps; ++step) {
      if (feeder.feed({{&s, 1, DSO_PHASE_DECODE}}) != 0) return logits;
      dso_run_counts counts{};
      if (handovers && dso_plan_counts(model.plan, &counts) == 0) handovers->push_back(counts.handovers);
    }
    logits.insert(logits.end(), s.logits.begin(), s.logits.end());
  }
  return logits;
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? atoi(argv[1]) : rounds(60);
  Spec spec;
  spec.format = DSO_INT8;
  spec.activation = DSO_SLOT_Q16;
  const Kernels& kernels = *variants().back().kernels;
  Model alone(spec, kernels, 1);
  const auto want = run(alone, steps, nullptr);
  for (const int nodes : {1, 4}) {
    Model many(spec, kernels, on_nodes(kThreads, nodes));
    std::vector<int64_t> handovers;
    check(run(many, steps, &handovers) == want, "%d threads on %d nodes: other logits than one thread", kThreads, nodes);
    check((int)handovers.size() == steps, "%zu steps of %d", handovers.size(), steps);
    const auto [least, most] = std::minmax_element(handovers.begin(), handovers.end());
    // Of the fused steps of a layer: q, k and v; attention; o; gate and up; down. Of a step besides: the head. Norms and the
    // like are too short to be shared.
    check(!handovers.empty() && *least == *most && *most == 5 * spec.layers + 1, "%lld to %lld hand-overs a step",
          (long long)(handovers.empty() ? 0 : *least), (long long)(handovers.empty() ? 0 : *most));
    dso_run_counts counts{};
    check(dso_plan_counts(many.plan, &counts) == 0, "%s", dso_last_error());
    printf("%d steps, %d threads on %d node(s): %lld hand-overs a step, %lld sleeps in the last\n", steps, kThreads, nodes,
           (long long)counts.handovers, (long long)counts.sleeps);
  }
  return report("test_many_threads");
}
