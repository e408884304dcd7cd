// Speed of attention in training: GFLOP/s of forward and backward, counting only visible pairs of the causal mask.
//   bench_train_attention [isa]      one thread, by its own CPU time; default: all ISAs that run on this machine
#include "plan_parts.hpp"
#include "timing.hpp"
#include "train_attention_fixture.hpp"

static void measure(const Variant& v, const Shape& s) {
  Random random(1);
  Inputs in(s, 0, random);
  Results out(s, 0);
  Sequences of;
  for (int64_t row = 0; row < s.rows; ++row) of.add(row * s.row_tokens, (row + 1) * s.row_tokens);
  OwnContext context(*v.kernels, 1);
  // The only thread is the caller itself, so its CPU time is the whole time.
  const dso_train_attention a = call_of(in, out, of);
  const double forward = best([&] { check(dso_train_attention_forward(context.c, &a) == DSO_OK, "%s", dso_last_error()); });
  const double backward = best([&] { check(dso_train_attention_backward(context.c, &a) == DSO_OK, "%s", dso_last_error()); });
  const double pairs = (double)s.rows * s.row_tokens * (s.row_tokens + 1) / 2 * s.heads;
  printf("%-12s %s %d x %4d, %2d/%d heads of %d/%d: forward %6.1f, backward %6.1f\n", v.name.c_str(),
         s.type == DSO_TYPE_BF16 ? "bf16" : "fp32", s.rows, s.row_tokens, s.heads, s.kv_heads, s.qk_width, s.v_width,
         2 * pairs * (s.qk_width + s.v_width) / forward * 1e-9, 2 * pairs * (3 * s.qk_width + 2 * s.v_width) / backward * 1e-9);
}

int main(int argc, char** argv) {
  for (const Variant& v : variants()) {
    if (argc > 1 ? v.name != argv[1] : v.name == "amx-emulated") continue;
    for (const int type : {DSO_TYPE_BF16, DSO_TYPE_F32})
      for (const Shape& s : {Shape{type, 2, 1024, 9, 3, 64, 64}, Shape{type, 1, 2048, 8, 2, 128, 128},
                             Shape{type, 1, 1024, 4, 4, 192, 128}, Shape{type, 32, 64, 9, 3, 64, 64}})
        measure(v, s);
  }
  return failures ? 1 : 0;
}
