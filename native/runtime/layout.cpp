#include "layout.hpp"

#include "error.hpp"

namespace dso {
namespace {
constexpr int64_t kLargest =
    int64_t(1) << 31;  // exclusive upper limit of rows, columns and widths, so that products fit in int64
}

int64_t band_rows(int32_t format) { return format == DSO_FP8 ? 128 : kTileRows; }

int64_t packed_bytes(int32_t format, int64_t rows, int64_t cols) {
  if (tile_bytes(format) < 0 || rows < 1 || cols < 1 || rows >= kLargest || cols >= kLargest) return -1;
  if (int_layout(format).superblock && cols % (superblock_groups * kTileCols)) return -1;
  int64_t bytes;
  if (__builtin_mul_overflow(ceil_div(rows, kTileRows) * ceil_div(cols, kTileCols), tile_bytes(format), &bytes)) return -1;
  return bytes;
}

int64_t row_bytes(int32_t slot_kind, int64_t width) {
  if (width < 1 || width >= kLargest) return -1;
  const int64_t padded = round_up(width, 32), groups = padded / 32;
  switch (slot_kind) {
    case DSO_SLOT_F32:
    case DSO_SLOT_LOGITS:
      return round_up(4 * width, 64);
    case DSO_SLOT_BF16:
      return 2 * padded;
    case DSO_SLOT_Q8:
      return round_up(padded + 8 * groups, 64);
    case DSO_SLOT_Q16:
      return round_up(2 * padded + 8 * groups, 64);
    default:
      return -1;
  }
}

bool is_f32(int32_t slot_kind) { return slot_kind == DSO_SLOT_F32 || slot_kind == DSO_SLOT_LOGITS; }

const char* format_name(int32_t format) {
  switch (format) {
    case DSO_F32:
      return "F32";
    case DSO_BF16:
      return "BF16";
    case DSO_INT8:
      return "INT8";
    case DSO_INT4:
      return "INT4";
    case DSO_INT3:
      return "INT3";
    case DSO_INT8_NESTED:
      return "INT8_NESTED";
    case DSO_INT4_NESTED:
      return "INT4_NESTED";
    case DSO_Q4_1:
      return "Q4_1";
    case DSO_FP8:
      return "FP8";
    case DSO_Q2_K:
      return "Q2_K";
    case DSO_Q3_K:
      return "Q3_K";
    case DSO_Q4_K:
      return "Q4_K";
    case DSO_Q5_K:
      return "Q5_K";
    case DSO_Q6_K:
      return "Q6_K";
    case DSO_IQ4_XS:
      return "IQ4_XS";
    case DSO_IQ4_NL:
      return "IQ4_NL";
    case DSO_Q5_0:
      return "Q5_0";
    case DSO_Q5_1:
      return "Q5_1";
    case DSO_MXFP4:
      return "MXFP4";
    case DSO_VECTOR:
      return "VECTOR";
    default:
      return "an unknown format";
  }
}

const char* kind_name(int32_t slot_kind) {
  switch (slot_kind) {
    case DSO_SLOT_F32:
      return "F32";
    case DSO_SLOT_BF16:
      return "BF16";
    case DSO_SLOT_Q8:
      return "Q8";
    case DSO_SLOT_Q16:
      return "Q16";
    case DSO_SLOT_LOGITS:
      return "LOGITS";
    default:
      return "an unknown kind";
  }
}

bool reads(int32_t format, int32_t slot_kind) {
  switch (format) {
    case DSO_F32:
      return slot_kind == DSO_SLOT_F32;
    case DSO_BF16:
    case DSO_FP8:
      return slot_kind == DSO_SLOT_BF16;
    default:
      return int_layout(format).low && (slot_kind == DSO_SLOT_Q8 || slot_kind == DSO_SLOT_Q16);
  }
}

int32_t finest_kind(int32_t format) {
  for (int32_t kind : {DSO_SLOT_F32, DSO_SLOT_Q16, DSO_SLOT_BF16})
    if (reads(format, kind)) return kind;
  return -1;
}

int64_t latent_row_bytes(int32_t kv_type, int64_t rank, int64_t rope) {
  if (kv_type == DSO_KV_F32) return 4 * (rank + rope);
  if (kv_type == DSO_KV_BF16) return 2 * (rank + rope);
  const int64_t scales = 4 * ceil_div(rank, latent_group);
  if (kv_type == DSO_KV_INT8) return rank + scales + 2 * rope;
  return rank / 2 + scales + rope + 4 * ceil_div(rope, latent_group);
}

int64_t index_row_bytes(int32_t kv_type, int64_t index) { return (kv_type == DSO_KV_F32 ? 4 : 2) * index; }

int64_t summary_bytes(int32_t kv_type, int64_t width) { return summary_blocks * 2 * width * (kv_type == DSO_KV_F32 ? 4 : 2); }

Matrix check_matrix(const dso_weight& w, const std::string& what) { return check_stack(w, 1, what).first; }

Stack check_stack(const dso_weight& w, int64_t count, const std::string& what) {
  if (tile_bytes(w.format) < 0) fail(DSO_EINVAL, "%s: format %d is not a packed matrix format", what.c_str(), w.format);
  const int64_t expected = packed_bytes(w.format, w.rows, w.cols);
  if (expected < 0) fail(DSO_EINVAL, "%s: invalid shape: a matrix of %d x %d", what.c_str(), w.rows, w.cols);
  const int64_t given = w.count == 0 ? 1 : w.count;
  if (given != count)
    fail(DSO_EINVAL, "%s: a stack of %lld matrices, must be %lld", what.c_str(), (long long)given, (long long)count);
  if (!w.data) fail(DSO_EINVAL, "%s: data is NULL", what.c_str());
  int64_t all;
  if (__builtin_mul_overflow(expected, count, &all) || w.bytes != all)
    fail(DSO_EINVAL, "%s: %s of %d x %d takes %lld bytes, times %lld; bytes is %lld", what.c_str(), format_name(w.format),
         w.rows, w.cols, (long long)expected, (long long)count, (long long)w.bytes);
  return {{w.format, w.rows, w.cols, static_cast<const uint8_t*>(w.data)}, count, expected};
}

const float* check_vector(const dso_weight& w, int64_t cols, const std::string& what) {
  if (w.format != DSO_VECTOR) fail(DSO_EINVAL, "%s: must be a VECTOR, is %s", what.c_str(), format_name(w.format));
  if (w.rows != 1 || w.cols != cols)
    fail(DSO_EINVAL, "%s: must be 1 x %lld, is %d x %d", what.c_str(), (long long)cols, w.rows, w.cols);
  if (!w.data) fail(DSO_EINVAL, "%s: data is NULL", what.c_str());
  if (w.bytes != 4 * cols)
    fail(DSO_EINVAL, "%s: takes %lld bytes, but bytes is %lld", what.c_str(), (long long)(4 * cols), (long long)w.bytes);
  return static_cast<const float*>(w.data);
}

}  // namespace dso
