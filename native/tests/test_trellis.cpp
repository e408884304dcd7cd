// INT3: every variant packs the same bytes, whose values (block_layout.hpp) are near the weights and are what unpacking gives;
// nothing is written outside a tile row's place or read outside the source. tests/backends/cpu/test_isa.py compares the bytes
// with the definition.
#include <algorithm>

#include "block_layout.hpp"

namespace {
struct Case {
  int rows, cols;
  std::vector<float> weights, importance;  // [rows][cols]; of columns, or empty

  const float* columns() const { return importance.empty() ? nullptr : importance.data(); }
};

void pack(const Variant& v, const Case& c, const uint8_t* source, int tile, uint8_t* packed) {
  v.kernels->pack_tile(DSO_INT3, DSO_SRC_F32, source, c.rows, c.cols, 4 * (int64_t)c.cols, c.columns(), tile, packed);
}

void compare(const std::vector<Variant>& all, const Case& c, Random& random) {
  const int tiles = (c.rows + 15) / 16;
  const size_t bytes = block_bytes(*block_format(DSO_INT3), c.rows, c.cols), tile_row = bytes / (size_t)tiles;
  Buffer source(4 * c.weights.size());
  memcpy(source.get(), c.weights.data(), source.size());
  std::vector<uint8_t> want(bytes);
  for (int tile = 0; tile < tiles; ++tile) pack(all[0], c, source.get(), tile, want.data());
  const BlockMatrix matrix{*block_format(DSO_INT3), want.data(), c.cols};
  for (const Variant& v : all) {
    Buffer packed(bytes);
    const int one = random.below(tiles);
    pack(v, c, source.get(), one, packed.get());
    for (size_t i = 0; i < bytes; ++i)
      if (!check(packed[i] == (i / tile_row == (size_t)one ? want[i] : 0xa5), "%s [%d x %d] tile row %d: byte %zu",
                 v.name.c_str(), c.rows, c.cols, one, i))
        return;
    for (int tile = 0; tile < tiles; ++tile) pack(v, c, source.get(), tile, packed.get());
    if (!check(memcmp(packed.get(), want.data(), bytes) == 0, "%s [%d x %d]: bytes differ", v.name.c_str(), c.rows, c.cols))
      return;
    Buffer row(4 * (size_t)c.cols);
    for (int r = 0; r < c.rows; ++r) {
      v.kernels->embed_row({DSO_INT3, c.rows, c.cols, packed.get()}, r, 1.0f, (float*)row.get());
      for (int k = 0; k < c.cols; ++k) {
        float got;
        memcpy(&got, row.get() + 4 * k, 4);
        const float value = matrix.scale(r, k) * (float)matrix.value(r, k);
        if (!check(same(got, value), "%s (%d, %d): unpacked %g, not %g", v.name.c_str(), r, k, got, value)) return;
      }
    }
  }
  double error = 0, size = 0;
  for (int r = 0; r < c.rows; ++r)
    for (int k = 0; k < c.cols; ++k) {
      const double w = c.weights[(size_t)(r * c.cols + k)], weight = c.importance.empty() ? 1 : c.importance[(size_t)k];
      if (!std::isfinite(w) || std::isnan(matrix.scale(r, k))) continue;
      error += weight * std::pow(matrix.scale(r, k) * (float)matrix.value(r, k) - w, 2), size += weight * w * w;
    }
  check(error <= 0.025 * size, "[%d x %d]: the weighted error is %g of the weights", c.rows, c.cols, error / size);
}
}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  if (all.empty()) return report("test_trellis");
  Random random(7);
  for (int round = 0; round < rounds(24); ++round) {
    Case c{1 + random.below(60), 1 + random.below(200), {}, {}};
    c.weights = normal((size_t)(c.rows * c.cols), std::ldexp(1.0f, -random.below(12)), random);
    if (round % 3 == 1)
      for (int k = 0; k < c.cols; ++k) c.importance.push_back(random.below(5) ? std::exp(random.normal()) : 0);
    if (round % 4 == 3)
      for (float bad : {(float)NAN, -INFINITY, 1e30f, 1e-30f, 0.0f})
        for (int i = 0; i < 4; ++i) c.weights[(size_t)random.below(c.rows * c.cols)] = bad;
    compare(all, c, random);
  }
  return report("test_trellis");
}
