// Sizes of packed weights and of slot rows, as dso.h lays them out, and the checks of what a caller hands over.
#pragma once
#include <cstdint>
#include <string>

#include "dso.h"
#include "kernels.hpp"

namespace dso {

struct Stack {  // matrices of one shape, each packed by itself, one after the other
  Matrix first;
  int64_t count, bytes;  // bytes: of one
  Matrix at(int64_t i) const { return {first.format, first.rows, first.cols, first.data + i * bytes}; }
};

constexpr int64_t kTileRows = 16, kTileCols = 32;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

int64_t tile_bytes(int32_t format);                                // -1: not a packed format
int64_t band_rows(int32_t format);                                 // that pack_tile packs together
int64_t packed_bytes(int32_t format, int64_t rows, int64_t cols);  // -1: not a packed format, or a bad shape
int64_t row_bytes(int32_t slot_kind, int64_t width);               // -1: no such kind, or width < 1

bool is_f32(int32_t slot_kind);  // F32 and LOGITS
const char* format_name(int32_t format);
const char* kind_name(int32_t slot_kind);

// Whether the cache and attention take heads of this size.
constexpr bool is_head_dim(int64_t n) { return n >= 2 && n <= max_head_dim && n % 2 == 0; }

// A token's row in a latent cache: rank + rope numbers (INT8: the rank numbers in groups of latent_group, each group's fp32
// scale behind all of them, then the rope numbers in bf16); and its row of the indexer's key.
int64_t latent_row_bytes(int32_t kv_type, int64_t rank, int64_t rope);
int64_t index_row_bytes(int32_t kv_type, int64_t index);

// Of summary_blocks blocks: the largest and the smallest of `width` numbers each, in bf16 (F32: fp32).
int64_t summary_bytes(int32_t kv_type, int64_t width);

// The activation kinds a format's product reads.
bool reads(int32_t format, int32_t slot_kind);
int32_t finest_kind(int32_t format);  // of those, the one that loses least

// Error DSO_EINVAL, beginning with `what`, unless w is a packed matrix (or, for check_vector, a VECTOR of `cols`).
Matrix check_matrix(const dso_weight& w, const std::string& what);
Stack check_stack(const dso_weight& w, int64_t count, const std::string& what);  // of so many matrices
const float* check_vector(const dso_weight& w, int64_t cols, const std::string& what);

inline int64_t tile_rows(const Matrix& w) { return ceil_div(w.rows, kTileRows); }
inline int64_t tile_row_bytes(const Matrix& w) { return ceil_div(w.cols, kTileCols) * tile_bytes(w.format); }
inline int64_t matrix_bytes(const Matrix& w) { return tile_rows(w) * tile_row_bytes(w); }
inline Matrix tiles_of(const Matrix& w, int64_t begin, int64_t end) {  // rows of tiles [begin, end) as a matrix of their own
  return {w.format, int32_t((end * kTileRows < w.rows ? end * kTileRows : w.rows) - begin * kTileRows), w.cols,
          w.data + begin * tile_row_bytes(w)};
}

}  // namespace dso
