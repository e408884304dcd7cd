#include "fp8_blocks.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "layout.hpp"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

bool any_nan(const uint8_t* codes, int64_t stride, int64_t rows, int64_t cols) {
  uint8_t found = 0;
  for (int64_t r = 0; r < rows; ++r, codes += stride)
    for (int64_t c = 0; c < cols; ++c) found |= (codes[c] & 0x7f) == 0x7f;
  return found;
}

// One tile, of which `rows` x `cols` codes exist.
void repack_tile(const uint8_t* codes, int64_t stride, int64_t rows, int64_t cols, float scale, uint8_t* tile) {
  uint8_t row[kTileRows][kTileCols] = {};
  for (int64_t r = 0; r < rows; ++r) memcpy(row[r], codes + r * stride, size_t(cols));
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t c = 0; c < kTileCols; ++c) tile[fp8_at(r, c)] = row[r][c];
  tile += kTileRows * kTileCols;
  memset(tile, 0, size_t(tile_bytes(DSO_FP8) - kTileRows * kTileCols));
  memcpy(tile, &scale, sizeof scale);
}

}  // namespace

void repack_fp8_band(const uint8_t* codes, const float* scales, int64_t rows, int64_t cols, int64_t stride, int64_t band,
                     uint8_t* packed) {
  const int64_t first = band * kBlock, end = std::min(rows, first + kBlock), across = ceil_div(cols, kTileCols);
  for (int64_t c0 = 0; c0 < cols; c0 += kBlock) {
    const int64_t c1 = std::min(cols, c0 + kBlock);
    float scale = scales[band * ceil_div(cols, kBlock) + c0 / kBlock];
    if (any_nan(codes + first * stride + c0, stride, end - first, c1 - c0)) scale = NAN;
    for (int64_t r = first; r < end; r += kTileRows)
      for (int64_t c = c0; c < c1; c += kTileCols)
        repack_tile(codes + r * stride + c, stride, std::min(end - r, kTileRows), std::min(c1 - c, kTileCols), scale,
                    packed + (r / kTileRows * across + c / kTileCols) * tile_bytes(DSO_FP8));
  }
}

}  // namespace dso
