// Speed of matrix products: per variant, format and token count, GB/s of packed weights and GMAC/s on one core, compared with a
// plain read loop over the same buffer.
//   bench_linear [variant] [cols] [rows] [tokens...]       (default: every variant, 1536 8960, 1 4 16 512)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "block_layout.hpp"
#include "check.hpp"
#include "read_memory.hpp"

namespace {
template <class Body>
double best_seconds(Body body) {
  double best = 1e9, spent = 0;
  for (int i = 0; i < 3 || (spent < 0.25 && i < 400); ++i) {
    auto start = std::chrono::steady_clock::now();
    body();
    double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, s);
    spent += s;
  }
  return best;
}

void read_all(const uint8_t* p, size_t bytes) {
  static const ReadMemory read = widest_reads();
  volatile int64_t result = read(p, p + bytes / kReadStride * kReadStride);
  (void)result;
}
}  // namespace

int main(int argc, char** argv) {
  const char* only = argc > 1 ? argv[1] : "";
  const int cols = argc > 2 ? atoi(argv[2]) : 1536, rows = argc > 3 ? atoi(argv[3]) : 8960;
  std::vector<int> tokens;
  for (int i = 4; i < argc; ++i) tokens.push_back(atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 4, 16, 512};
  for (const Variant& variant : variants()) {
    if (*only && std::string(only) != "all" && variant.name != only) continue;
    const Kernels& k = *variant.kernels;
    printf("%s  cols %d rows %d\n", variant.name.c_str(), cols, rows);
    for (int format : {DSO_INT3, DSO_INT4, DSO_INT4_NESTED, DSO_Q4_1, DSO_INT8, DSO_INT8_NESTED, DSO_Q2_K, DSO_Q3_K, DSO_Q4_K,
                       DSO_Q5_K, DSO_Q6_K, DSO_IQ4_XS, DSO_MXFP4, DSO_FP8, DSO_BF16})
      for (int kind : {DSO_SLOT_Q8, DSO_SLOT_Q16, DSO_SLOT_BF16}) {
        if ((kind == DSO_SLOT_BF16) != (format == DSO_FP8 || format == DSO_BF16)) continue;
        const BlockFormat* block = block_format(format);
        const size_t bytes = block ? block_bytes(*block, rows, cols) : packed_bytes(format, rows, cols);
        Buffer data(bytes), scratch(k.linear_scratch);
        Random random(1);
        for (size_t i = 0; i < bytes; ++i) data[i] = (uint8_t)(i * 2654435761u >> 13);
        for (int r = 0; block && !block->byte_scales() && r < rows; ++r)  // finite scales
          for (int c = 0; c < cols; c += 32)
            for (int field = 0; field < 1 + block->has_min; ++field)
              BlockMatrix{*block, data.get(), cols}.halves(r, c)[32 * field + 1] = 0x14;
        for (int r = 0; format == DSO_MXFP4 && r < rows; ++r)  // near 1: sums of infinities and subnormals take another time
          for (int c = 0; c < cols; c += 32) *BlockMatrix{*block, data.get(), cols}.byte(r, c) = 120;
        const bool nested = format == DSO_INT4_NESTED || format == DSO_INT8_NESTED;
        for (size_t i = 0; nested && i < bytes; i += 2) data[i + 1] = 0x14;
        for (size_t tile = 0; !block && !nested && tile < bytes; tile += tile_bytes(format))  // for FP8, one float
          for (size_t i = code_bytes(format); i < tile_bytes(format); i += 2) data[tile + i + 1] = 0x14;
        for (size_t i = 0; format == DSO_FP8 && i < bytes; ++i) data[i] |= 0x08;  // subnormals are rare in weights, and slow
        const Matrix w = {format, rows, cols, data.get()};
        const double read = best_seconds([&] { read_all(data.get(), bytes); });
        printf("  %-6s %-4s %6.1f MB  read %5.1f GB/s |", block ? block->name : format_name(format),
               kind == DSO_SLOT_Q8    ? "q8"
               : kind == DSO_SLOT_Q16 ? "q16"
                                      : "bf16",
               bytes / 1e6, bytes / read / 1e9);
        for (int T : tokens) {
          const size_t stride = row_bytes(kind, cols);
          Buffer x(T * stride);
          std::vector<float> row(cols), y((size_t)T * rows);
          for (int t = 0; t < T; ++t) {
            for (float& v : row) v = random.normal();
            k.convert(kind, row.data(), 0, cols, cols, x.get() + t * stride);
          }
          const double s = best_seconds([&] {
            for (int tile = 0; tile < (rows + 15) / 16; tile += 48)  // as the runtime splits work
              k.linear(w, nullptr, kind, x.get(), stride, T, T > 1, tile, std::min(tile + 48, (rows + 15) / 16), y.data(),
                       4 * (int64_t)rows, scratch.get());
          });
          printf(" T=%d %5.1f GB/s %5.1f GMAC/s |", T, bytes / s / 1e9, (double)rows * cols * T / s / 1e9);
          fflush(stdout);
        }
        printf("\n");
      }
  }
}
