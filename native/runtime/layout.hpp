// Sizes of packed weights and slot rows as laid out in dso.h, and checks of the caller's weights.
#pragma once
#include <cstdint>
#include <string>

#include "dso.h"
#include "kernels.hpp"
#include "tile_bytes.hpp"

namespace dso {

struct Stack {  // matrices of one shape, each packed separately, stored consecutively
  Matrix first;
  int64_t count, bytes;  // bytes: of one matrix
  Matrix at(int64_t i) const { return {first.format, first.rows, first.cols, first.data + i * bytes}; }
};

constexpr int64_t kTileRows = 16, kTileCols = 32;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t band_rows(int32_t format);                                 // rows that pack_tile packs together
int64_t packed_bytes(int32_t format, int64_t rows, int64_t cols);  // -1: not a packed format, or an invalid shape
int64_t row_bytes(int32_t slot_kind, int64_t width);               // -1: invalid kind, or width < 1

bool is_f32(int32_t slot_kind);  // F32 and LOGITS
const char* format_name(int32_t format);
const char* kind_name(int32_t slot_kind);

// Whether cache and attention support this head size.
constexpr bool is_head_dim(int64_t n) { return n >= 2 && n <= max_head_dim && n % 2 == 0; }

// Bytes of a token's row in a latent cache: rank + rope elements (INT8: the rank elements in groups of latent_group, then the
// fp32 scales of all groups, then the rope elements in bf16; INT4: the same with two codes in a byte, then the rope elements as
// int8 does its rank elements); and of its row of the indexer's key.
int64_t latent_row_bytes(int32_t kv_type, int64_t rank, int64_t rope);
int64_t index_row_bytes(int32_t kv_type, int64_t index);

// Bytes for summary_blocks blocks: maximum and minimum of `width` elements each, in bf16 (F32: fp32).
int64_t summary_bytes(int32_t kv_type, int64_t width);

// Whether a format's product reads activations of this kind.
bool reads(int32_t format, int32_t slot_kind);
int32_t finest_kind(int32_t format);  // the most precise of these

// Error DSO_EINVAL, starting with `what`, unless w is a packed matrix (or, for check_vector, a VECTOR of `cols`).
Matrix check_matrix(const dso_weight& w, const std::string& what);
Stack check_stack(const dso_weight& w, int64_t count, const std::string& what);  // of `count` matrices
const float* check_vector(const dso_weight& w, int64_t cols, const std::string& what);

inline int64_t tile_rows(const Matrix& w) { return ceil_div(w.rows, kTileRows); }
inline int64_t tile_row_bytes(const Matrix& w) { return ceil_div(w.cols, kTileCols) * tile_bytes(w.format); }
inline int64_t matrix_bytes(const Matrix& w) { return tile_rows(w) * tile_row_bytes(w); }
inline Matrix tiles_of(const Matrix& w, int64_t begin, int64_t end) {  // the rows of tiles [begin, end) as a separate matrix
  return {w.format, int32_t((end * kTileRows < w.rows ? end * kTileRows : w.rows) - begin * kTileRows), w.cols,
          w.data + begin * tile_row_bytes(w)};
}

}  // namespace dso
