// Speed of the products of training: GFLOP/s of the three forms, for a model's shapes.
//   bench_train_product [threads] [isa] [T...]      (default: all cores, the best ISA, 1024 2048)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.hpp"
#include "dso_train.h"
#include "timing.hpp"

namespace {
// The best of several runs: by wall clock, or with one thread by its own CPU time, which other processes on the core do not
// affect.
double best_seconds(dso_context* c, int form, int flags, int64_t M, int64_t N, int64_t K, const dso_train_matrix& a,
                    const dso_train_matrix& b, const dso_train_matrix& y) {
  const auto product = [&] {
    check(dso_train_product(c, form, flags, M, N, K, &a, &b, nullptr, &y) == DSO_OK, "%s", dso_last_error());
  };
  if (dso_context_threads(c) == 1) return best(product);
  double least = 1e9, spent = 0;
  for (int i = 0; i < 3 || (spent < 0.3 && i < 50); ++i) {
    const auto start = std::chrono::steady_clock::now();
    product();
    const double time = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    least = std::min(least, time), spent += time;
  }
  return least;
}
}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : 0;
  const char* isa = argc > 2 && *argv[2] ? argv[2] : nullptr;
  std::vector<int64_t> tokens;
  for (int i = 3; i < argc; ++i) tokens.push_back(atoll(argv[i]));
  if (tokens.empty()) tokens = {1024, 2048};
  dso_context* c = nullptr;
  if (!check(dso_context_create(isa, threads, &c) == DSO_OK, "%s", dso_last_error())) return report("bench_train_product");
  printf("%s, %d threads: GFLOP/s of y = x W^T, dx = dy W, dW = dy^T x (bf16); the same in fp32\n", dso_context_isa(c),
         dso_context_threads(c));
  const int64_t shapes[][2] = {{576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {49152, 576}};
  for (const int64_t T : tokens)
    for (const auto& [N, K] : shapes) {
      printf("T %5lld  N %5lld K %5lld ", (long long)T, (long long)N, (long long)K);
      for (const int type : {DSO_TYPE_BF16, DSO_TYPE_F32}) {
        const size_t size = type == DSO_TYPE_BF16 ? 2 : 4;
        if (type == DSO_TYPE_F32 && N > 4096) continue;
        Buffer x((size_t)(T * K) * size, 0x3c), w((size_t)(N * K) * size, 0x3c), y((size_t)(T * N) * size, 0x3c);
        const dso_train_matrix mx{x.get(), K, 0, type, 0}, mw{w.get(), K, 0, type, 0}, my{y.get(), N, 0, type, 0};
        const int flags = type == DSO_TYPE_F32 ? DSO_PRODUCT_EXACT : 0;
        const double work = 2e-9 * (double)T * (double)N * (double)K;
        printf(" | %6.1f", work / best_seconds(c, DSO_PRODUCT_NT, flags, T, N, K, mx, mw, my));
        printf(" %6.1f", work / best_seconds(c, DSO_PRODUCT_NN, flags, T, K, N, my, mw, mx));
        printf(" %6.1f", work / best_seconds(c, DSO_PRODUCT_TN, flags, N, K, T, my, mx, mw));
        fflush(stdout);
      }
      printf("\n");
    }
  dso_context_destroy(c);
  return report("bench_train_product");
}
