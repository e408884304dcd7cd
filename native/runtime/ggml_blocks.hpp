// The blocks of ggml's types hold the same numbers as tiles, in another order: repacking moves bits without rounding.
#pragma once
#include <cstdint>

namespace dso {

struct GgmlBlock {
  int64_t cols, bytes;  // of a row; 0: no ggml type has the codes of the format
};
GgmlBlock ggml_block(int32_t format);

// Converts tile row `tile` of a matrix whose rows are blocks, `stride` bytes apart.
void repack_tile_row(int32_t format, const uint8_t* source, int64_t rows, int64_t cols, int64_t stride, int64_t tile,
                     uint8_t* packed);

}  // namespace dso
