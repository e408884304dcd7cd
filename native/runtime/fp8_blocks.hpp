// Converts a matrix stored in E4M3 with one scale per 128 x 128 block, as in DeepSeek's checkpoints, to FP8 tiles: bytes are
// moved, nothing is rounded.
#pragma once
#include <cstdint>

namespace dso {

// Converts rows [128 band, 128 band + 128) of codes whose rows are `stride` bytes apart. A block with a NaN code gets scale
// NaN.
void repack_fp8_band(const uint8_t* codes, const float* scales, int64_t rows, int64_t cols, int64_t stride, int64_t band,
                     uint8_t* packed);

}  // namespace dso
