// The class of tile.hpp in plain code, bit for bit as the instructions are documented (Intel SDM; felixcloutier.com/x86/
// tdpbssd:tdpbsud:tdpbusd:tdpbuud and /x86/tdpbf16ps), so that all code based on tiles can be tested on hosts without them.
// Using a tile before shape(), or with zero rows, traps, as on the processor.
#pragma once
#include <cstdint>
#include <cstring>

namespace dso::DSO_ISA_NAMESPACE {
namespace {

// Of what only reads and writes tiles, whose sizes `used` checks: sanitizers would make it several times slower.
#define DSO_UNSANITIZED __attribute__((no_sanitize("address", "undefined")))

class Tiles {
 public:
  explicit Tiles(int k_bytes) : k_bytes_(k_bytes) {}
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  void shape(int rows0, int rows1) {
    memset(tiles_, 0, sizeof tiles_);
    auto set = [this](int tile, int rows, int bytes) { tiles_[tile].rows = rows, tiles_[tile].row_bytes = bytes; };
    set(0, rows0, 64), set(1, rows0, 64), set(4, rows0, k_bytes_);
    set(2, rows1, 64), set(3, rows1, 64), set(5, rows1, k_bytes_);
    set(6, k_bytes_ / 4, 64), set(7, k_bytes_ / 4, 64);
  }

  template <int t>
  void zero() {
    memset(used(t).bytes, 0, sizeof tiles_[t].bytes);
  }
  template <int t>
  void load(const void* p, int64_t stride) {
    Tile& tile = used(t);
    memset(tile.bytes, 0, sizeof tile.bytes);
    for (int r = 0; r < tile.rows; r++) memcpy(tile.bytes[r], (const uint8_t*)p + r * stride, (size_t)tile.row_bytes);
  }
  template <int t>
  void store(void* p, int64_t stride) {
    const Tile& tile = used(t);
    for (int r = 0; r < tile.rows; r++) memcpy((uint8_t*)p + r * stride, tile.bytes[r], (size_t)tile.row_bytes);
  }

  template <int c, int a, int b>
  DSO_UNSANITIZED void dot_s8_u8() {
    Tile& out = used(c);
    const Tile &left = used(a), &right = used(b);
    for (int m = 0; m < out.rows; m++) {
      uint32_t sum[16];  // unsigned: wraps without saturation
      memcpy(sum, out.bytes[m], sizeof sum);
      for (int k = 0; k < left.row_bytes / 4; k++)
        for (int n = 0; n < 16; n++)
          for (int i = 0; i < 4; i++)
            sum[n] += (uint32_t)((int8_t)left.bytes[m][4 * k + i] * (int32_t)right.bytes[k][4 * n + i]);
      memcpy(out.bytes[m], sum, sizeof sum);
    }
  }

  // Even and odd columns are two chains of fused multiply-adds that start from zero in every instruction; their sum is added to
  // C. Denormal inputs and outputs count as zero, whatever MXCSR says.
  template <int c, int a, int b>
  DSO_UNSANITIZED void dot_bf16() {
    Tile& out = used(c);
    const Tile &left = used(a), &right = used(b);
    for (int m = 0; m < out.rows; m++) {
      float even[16] = {}, odd[16] = {}, sum[16];
      for (int k = 0; k < left.row_bytes / 4; k++)
        for (int n = 0; n < 16; n++) {
          even[n] = flush(__builtin_fmaf(bf16(left.bytes[m] + 4 * k), bf16(right.bytes[k] + 4 * n), even[n]));
          odd[n] = flush(__builtin_fmaf(bf16(left.bytes[m] + 4 * k + 2), bf16(right.bytes[k] + 4 * n + 2), odd[n]));
        }
      memcpy(sum, out.bytes[m], sizeof sum);
      for (int n = 0; n < 16; n++) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
      memcpy(out.bytes[m], sum, sizeof sum);
    }
  }

 private:
  struct Tile {
    alignas(64) uint8_t bytes[16][64];
    int rows, row_bytes;
  };

  Tile& used(int t) {
    if (tiles_[t].rows < 1 || tiles_[t].rows > 16 || tiles_[t].row_bytes > 64) __builtin_trap();
    return tiles_[t];
  }
  DSO_UNSANITIZED static float flush(float x) {  // denormals to zero with the same sign
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7f800000u) == 0) u &= 0x80000000u;
    memcpy(&x, &u, 4);
    return x;
  }
  DSO_UNSANITIZED static float bf16(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    const uint32_t u = (uint32_t)h << 16;
    float x;
    memcpy(&x, &u, 4);
    return flush(x);
  }

  int k_bytes_;
  Tile tiles_[8] = {};
};
#undef DSO_UNSANITIZED

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
