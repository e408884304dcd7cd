// The engine of generic/train_product.hpp on tile registers: two tiles of rows by two of columns. Its arithmetic differs from
// the vector engine: products of 32 columns are added to C as TDPBF16PS does, ascending.
#pragma once
#include "../generic/train_product.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace {

template <Numbers kind>
class TileUnits {
 public:
  static_assert(kind == Numbers::bf16);
  static constexpr bool lanes_first = true;
  static constexpr int rows = 32, panels = 2;

  void multiply(const uint8_t* a, int64_t a_next, const uint8_t* b, int64_t b_next, int64_t steps, int64_t m, int64_t n,
                float* sums, bool begin) {
    constexpr int64_t row = 64 * panels;  // bytes
    const int64_t first = m < 16 ? m : 16, second = m - first;
    const bool low = second > 0, wide = n > 1;
    uint8_t* const c = (uint8_t*)sums;
    if (m != shaped_) tiles_.shape((int)first, (int)second), shaped_ = m;
    begin ? tiles_.zero<0>() : tiles_.load<0>(c, row);
    if (wide) begin ? tiles_.zero<1>() : tiles_.load<1>(c + 64, row);
    if (low) begin ? tiles_.zero<2>() : tiles_.load<2>(c + 16 * row, row);
    if (low && wide) begin ? tiles_.zero<3>() : tiles_.load<3>(c + 16 * row + 64, row);
    const int64_t blocks = (steps + block_steps - 1) / block_steps;
    for (int64_t i = 0; i < blocks; i++, a += block_bytes, b += block_bytes) {
      tiles_.load<4>(a, 64);
      tiles_.load<6>(b, 64);
      tiles_.dot_bf16<0, 4, 6>();
      if (wide) tiles_.load<7>(b + b_next, 64), tiles_.dot_bf16<1, 4, 7>();
      if (low) {
        tiles_.load<5>(a + a_next, 64);
        tiles_.dot_bf16<2, 5, 6>();
        if (wide) tiles_.dot_bf16<3, 5, 7>();
      }
    }
    tiles_.store<0>(c, row);
    if (wide) tiles_.store<1>(c + 64, row);
    if (low) tiles_.store<2>(c + 16 * row, row);
    if (low && wide) tiles_.store<3>(c + 16 * row + 64, row);
  }

 private:
  Tiles tiles_{64};
  int64_t shaped_ = 0;
};

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
