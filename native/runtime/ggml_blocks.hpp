// ggml's Q4_0, Q4_1 and Q8_0 hold the same codes as INT4, Q4_1 and INT8 in another order: repacking moves bits without
// rounding.
#pragma once
#include <cstdint>

namespace dso {

int64_t ggml_block_bytes(int32_t format);  // bytes for 32 columns of a row; -1: no ggml type has the codes of this format

// Converts tile row `tile` of a matrix whose rows are blocks, `stride` bytes apart.
void repack_tile_row(int32_t format, const uint8_t* source, int64_t rows, int64_t cols, int64_t stride, int64_t tile,
                     uint8_t* packed);

}  // namespace dso
