// Products on AMX tiles against the vector kernels of AVX-512 that they replace, for benchmarks/amx.py: a line of JSON per
// format and kind of activations, with microseconds of the fastest run on one core.
//   bench_amx amx|amx-emulated [cols] [rows] [seconds per time]
// Build with -DDSO_AMX_VECTOR_TOKENS=0, so that tiles compute any number of tokens.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.hpp"
#include "timing.hpp"

namespace {

struct Case {
  int format, kind;
};
constexpr Case kCases[] = {
    {DSO_INT4, DSO_SLOT_Q8},  {DSO_INT8, DSO_SLOT_Q8},  {DSO_Q4_1, DSO_SLOT_Q8},   {DSO_INT3, DSO_SLOT_Q8},
    {DSO_INT8, DSO_SLOT_Q16}, {DSO_Q4_K, DSO_SLOT_Q16}, {DSO_BF16, DSO_SLOT_BF16},
};
constexpr int kTokens[] = {1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 256};

double microseconds(const Kernels& k, const Matrix& w, int kind, int T, double least) {
  const size_t stride = (size_t)row_bytes(kind, w.cols);
  Buffer x((size_t)T * stride), scratch(k.linear_scratch);
  std::vector<float> row((size_t)w.cols), y((size_t)T * (size_t)w.rows);
  Random random(2);
  for (int t = 0; t < T; ++t) {
    for (float& v : row) v = random.normal();
    k.convert(kind, row.data(), 0, w.cols, w.cols, x.get() + (size_t)t * stride);
  }
  double fastest = 1e9, spent = 0;
  for (int i = 0; i < 3 || spent < least; ++i) {
    const double start = seconds();
    for (int tile = 0; tile < (w.rows + 15) / 16; tile += 12)  // as the runtime splits work
      k.linear(w, nullptr, kind, x.get(), (int64_t)stride, T, true, tile, std::min(tile + 12, (w.rows + 15) / 16), y.data(),
               4 * (int64_t)w.rows, scratch.get());
    const double took = seconds() - start;
    fastest = std::min(fastest, took);
    spent += took;
  }
  return 1e6 * fastest;
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = argc > 1 ? argv[1] : "amx";
  const int cols = argc > 2 ? atoi(argv[2]) : 2048, rows = argc > 3 ? atoi(argv[3]) : 2048;
  const double least = argc > 4 ? atof(argv[4]) : 0.1;
  dso_context* context = nullptr;  // says what is missing, and asks the system for the tiles
  if (dso_context_create(isa, 1, &context) != 0) {
    fprintf(stderr, "%s\n", dso_last_error());
    return 2;
  }
  dso_context_destroy(context);
  const Kernels& tiles = strcmp(isa, "amx") == 0 ? *kernels_amx() : *kernels_amx_emulated();
  const Kernels& vectors = *kernels_avx512_bf16();
  for (const Case& c : kCases) {
    std::vector<float> values((size_t)rows * (size_t)cols);
    Random random(1);
    for (float& v : values) v = random.normal();
    Buffer data((size_t)packed_bytes(c.format, rows, cols));
    if (c.format == DSO_Q4_K) {  // packed from ggml's blocks only: any codes, finite scales
      for (size_t i = 0; i < data.size(); ++i) data[i] = (uint8_t)(i * 2654435761u >> 13) & 0x1f;
    } else {
      for (int tile = 0; tile < (rows + 15) / 16; ++tile)
        vectors.pack_tile(c.format, DSO_SRC_F32, values.data(), rows, cols, 4 * cols, nullptr, tile, data.get());
    }
    const Matrix w = {c.format, rows, cols, data.get()};
    printf("{\"format\": \"%s\", \"kind\": %d, \"cols\": %d, \"rows\": %d", format_name(c.format), c.kind, cols, rows);
    for (const char* name : {"tokens", "tiles", "vectors"}) {
      printf(", \"%s\": [", name);
      const char* comma = "";
      for (const int T : kTokens) {
        const double value =
            *name == 't' && name[1] == 'o' ? T : microseconds(*name == 'v' ? vectors : tiles, w, c.kind, T, least);
        printf("%s%.6g", comma, value);
        comma = ", ";
      }
      printf("]");
    }
    printf("}\n");
    fflush(stdout);
  }
}
