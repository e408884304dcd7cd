// Speed of experts: per token count, GB/s of the chosen experts' packed weights and GMAC/s, for each of the two steps
// separately.
//   bench_experts [variant] [threads] [tokens...]       (default: the best variant, 1 thread, 1 4 64 512)
//   SHAPE=hidden,inner,experts,top_k (default: DeepSeek-V2-Lite's, 2048,1408,64,6), FORMAT=int4|int8|q4_1
#include <algorithm>
#include <cstdio>
#include <set>

#include "check.hpp"
// After check.hpp, whose size functions are an independent implementation of the layout.
#include "experts_fixture.hpp"

int main(int argc, char** argv) {
  const std::vector<Variant> all = variants();
  const Variant* variant = &all.back();
  for (const Variant& v : all)
    if (argc > 1 && v.name == argv[1]) variant = &v;
  const int threads = argc > 2 ? atoi(argv[2]) : 1;
  std::vector<int> tokens;
  for (int i = 3; i < argc; ++i) tokens.push_back(atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 4, 64, 512};

  MoeSpec spec{2048, 1408, 64, 6};
  if (const char* shape = getenv("SHAPE")) sscanf(shape, "%d,%d,%d,%d", &spec.hidden, &spec.inner, &spec.experts, &spec.top_k);
  const std::string format = getenv("FORMAT") ? getenv("FORMAT") : "int4";
  spec.up_format = spec.down_format = format == "int8" ? DSO_INT8 : format == "q4_1" ? DSO_Q4_1 : DSO_INT4;
  spec.up_kind = spec.down_kind = format == "int4" ? DSO_SLOT_Q8 : DSO_SLOT_Q16;
  MoeWeights weights(spec, [](int32_t f, int32_t rows, int32_t cols, uint8_t* packed) {  // any codes, finite scales
    const size_t bytes = ::packed_bytes(f, rows, cols), tile = ::tile_bytes(f);
    for (size_t i = 0; i < bytes; ++i)
      packed[i] = i % tile < ::code_bytes(f) ? (uint8_t)(i * 2654435761u >> 13) : i % 2 ? 0x14 : (uint8_t)i;
  });
  Moe moe(spec, weights, *variant->kernels, threads);
  printf("%s, %d threads: %d of %d experts of %d x %d in %s\n", variant->name.c_str(), threads, spec.top_k, spec.experts,
         spec.inner, spec.hidden, format.c_str());

  Random random(1);
  for (int T : tokens) {
    std::vector<float> x((size_t)T * (size_t)spec.hidden);
    double best[2] = {1e9, 1e9}, spent = 0, bytes[2] = {};
    for (int run = 0; run < 3 || (spent < 0.5 && run < 200); ++run) {
      for (float& v : x) v = random.normal();  // other experts each time: the CPU caches hold few of them
      dso_plan_set_timing(moe.plan(), 1);
      const Moe::Out out = moe.run(x, T, T < 8 ? T : 0);
      std::vector<double> seconds(moe.steps().size());
      int64_t runs;
      dso_plan_timing(moe.plan(), seconds.data(), &runs);
      std::set<int> chosen;
      for (int t = 0; t < T; ++t)
        for (int j = 0; j < spec.top_k; ++j) chosen.insert((int)out.routes[(size_t)((t * 2) * spec.top_k + j)]);
      for (size_t i = 0; i < seconds.size(); ++i)
        for (int which = 0; which < 2; ++which)
          if (moe.steps()[i].op == (which ? DSO_OP_EXPERTS_DOWN : DSO_OP_EXPERTS_GATE_UP) && seconds[i] < best[which]) {
            best[which] = seconds[i];
            bytes[which] = (double)chosen.size() * (double)(which ? weights.down : weights.gate_up)->size() / spec.experts;
          }
      for (double s : seconds) spent += s;
    }
    const double macs = (double)T * spec.top_k * spec.hidden * spec.inner;
    printf("  T %4d  gate_up %9.3f ms %6.1f GB/s %7.1f GMAC/s   down %9.3f ms %6.1f GB/s %7.1f GMAC/s\n", T, 1e3 * best[0],
           bytes[0] / best[0] / 1e9, 2 * macs / best[0] / 1e9, 1e3 * best[1], bytes[1] / best[1] / 1e9, macs / best[1] / 1e9);
    fflush(stdout);
  }
}
