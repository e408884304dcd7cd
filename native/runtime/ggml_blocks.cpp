// Blocks as defined in ggml-common.h of llama.cpp: fp16 scale (Q4_1: and minimum), then codes. 4-bit: 16 bytes, columns 0..15
// in the low nibbles, 16..31 in the high ones; 8-bit: 32 signed bytes.
#include "ggml_blocks.hpp"

#include <cstring>

#include "layout.hpp"

namespace dso {
namespace {

constexpr uint32_t kLow = 0x0f0f0f0f, kHigh = 0xf0f0f0f0, kTopBits = 0x80808080;

void reorder_nibbles(const uint32_t in[4], uint32_t out[4]) {
  out[0] = (in[0] & kLow) | (in[1] & kLow) << 4;
  out[1] = (in[2] & kLow) | (in[3] & kLow) << 4;
  out[2] = (in[0] >> 4 & kLow) | (in[1] & kHigh);
  out[3] = (in[2] >> 4 & kLow) | (in[3] & kHigh);
}

// halves: number of fp16 values before a block's codes; words: 32-bit words of codes; zero: a word of zero codes.
template <int halves, int words, uint32_t zero>
void repack(const uint8_t* source, int64_t rows, int64_t groups, int64_t stride, uint8_t* packed) {
  constexpr int64_t block = 2 * halves + 4 * words;
  for (int64_t g = 0; g < groups; ++g, packed += kTileRows * block) {
    uint32_t codes[words][kTileRows];
    uint16_t numbers[halves][kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
      uint16_t number[halves] = {};
      uint32_t word[words];
      for (uint32_t& w : word) w = zero;
      if (r < rows) {
        const uint8_t* from = source + r * stride + g * block;
        uint32_t stored[words];
        memcpy(number, from, sizeof number);
        memcpy(stored, from + sizeof number, sizeof stored);
        if constexpr (words == 4)
          reorder_nibbles(stored, word);
        else
          for (int w = 0; w < words; ++w) word[w] = stored[w] ^ kTopBits;
      }
      for (int w = 0; w < words; ++w) codes[w][r] = word[w];
      for (int h = 0; h < halves; ++h) numbers[h][r] = number[h];
    }
    memcpy(packed, codes, sizeof codes);
    memcpy(packed + sizeof codes, numbers, sizeof numbers);
  }
}

}  // namespace

int64_t ggml_block_bytes(int32_t format) {
  return format == DSO_INT4 ? 18 : format == DSO_Q4_1 ? 20 : format == DSO_INT8 ? 34 : -1;
}

void repack_tile_row(int32_t format, const uint8_t* source, int64_t rows, int64_t cols, int64_t stride, int64_t tile,
                     uint8_t* packed) {
  const int64_t groups = cols / kTileCols, first = tile * kTileRows;
  source += first * stride;
  packed += tile * groups * tile_bytes(format);
  if (format == DSO_INT4) repack<1, 4, 0x88888888>(source, rows - first, groups, stride, packed);
  if (format == DSO_Q4_1) repack<2, 4, 0>(source, rows - first, groups, stride, packed);
  if (format == DSO_INT8) repack<1, 8, kTopBits>(source, rows - first, groups, stride, packed);
}

}  // namespace dso
