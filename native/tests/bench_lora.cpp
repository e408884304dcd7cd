// Speed of the low-rank products of adapters: per variant, formats and number of rows, GMAC/s of x A^T and of y += h B^T on one
// core, with matrices in the caches.
//   bench_lora [variant] [cols] [rank] [rows...]       (default: every variant, 576 16, 1 4 12 32)
#include "check.hpp"
#include "timing.hpp"

int main(int argc, char** argv) {
  const char* only = argc > 1 ? argv[1] : "all";
  const int32_t cols = argc > 2 ? atoi(argv[2]) : 576, rank = argc > 3 ? atoi(argv[3]) : 16;
  std::vector<int> counts;
  for (int i = 4; i < argc; ++i) counts.push_back(atoi(argv[i]));
  if (counts.empty()) counts = {1, 4, 12, 32};
  for (const Variant& v : variants()) {
    if (std::string(only) != "all" && v.name != only) continue;
    printf("%s  cols %d rank %d\n", v.name.c_str(), cols, rank);
    for (int32_t format : {DSO_F32, DSO_BF16})
      for (int32_t kind : {DSO_SLOT_F32, DSO_SLOT_BF16}) {
        printf("  %-4s x %-4s |", format == DSO_F32 ? "f32" : "bf16", kind == DSO_SLOT_F32 ? "f32" : "bf16");
        for (bool down : {true, false}) {
          const int32_t n = down ? rank : cols, k = down ? cols : rank;  // outputs, columns
          const int64_t tile = format == DSO_F32 ? 64 * k : (k + 1) / 2 * 64, tiles = (n + 15) / 16,
                        padded = (k + 31) / 32 * 32;
          Buffer w((size_t)(tile * tiles), 0);
          const LowRank matrix{format, n, k, w.get(), tile};
          for (int T : counts) {
            Buffer x((size_t)(T * padded * 4), 0), y((size_t)(T * n * 4), 0);
            const double s = best([&] {
              for (int repeat = 0; repeat < 100; ++repeat)
                v.kernels->low_rank(matrix, kind, x.get(), padded * (kind == DSO_SLOT_F32 ? 4 : 2), T, 0, tiles, !down,
                                    (float*)y.get(), 4 * (int64_t)n);
            });
            printf(" %s T=%d %5.1f", down ? "A" : "B", T, 100e-9 * n * k * T / s);
          }
          printf(" |");
        }
        printf("\n");
      }
  }
}
