// The C functions on single matrices, outside plans: conversion, products and packing do what dso.h says, with any number of
// threads. Invalid calls return their code and a message that names the culprit.
#include <cmath>

#include "block_layout.hpp"
#include "plan_parts.hpp"

namespace {

void direct() {
  for (const Variant& v : variants()) {
    const char* isa = v.name.c_str();
    OwnContext one(*v.kernels, 1), many(*v.kernels, 5);
    Random random(3);
    const int rows = 75, cols = 130, T = 40;
    std::vector<float> w((size_t)(rows * cols)), x((size_t)(T * cols)), bias((size_t)rows);
    for (float& f : w) f = random.normal();
    for (float& f : x) f = random.normal();
    for (float& f : bias) f = random.normal();
    const struct {
      int format, kind;
      double tolerance;
    } cases[] = {{DSO_F32, DSO_SLOT_F32, 1e-5}, {DSO_BF16, DSO_SLOT_BF16, 0.01}, {DSO_INT8, DSO_SLOT_Q16, 1e-3},
                 {DSO_INT4, DSO_SLOT_Q8, 0.02}, {DSO_Q4_1, DSO_SLOT_Q16, 1e-3},  {DSO_FP8, DSO_SLOT_BF16, 0.01}};
    for (const auto& k : cases) {
      Buffer packed(::packed_bytes(k.format, rows, cols)), again(packed.size());
      check(dso_pack(one.c, k.format, DSO_SRC_F32, w.data(), rows, cols, cols, nullptr, packed.get()) == 0 &&
                dso_pack(many.c, k.format, DSO_SRC_F32, w.data(), rows, cols, cols, nullptr, again.get()) == 0,
            "pack");
      check(memcmp(packed.get(), again.get(), packed.size()) == 0, "%s %s: packing depends on threads", isa,
            ::format_name(k.format));
      const dso_weight weight{k.format, rows, cols, 0, packed.get(), (int64_t)packed.size()};
      std::vector<float> real((size_t)(rows * cols)), part((size_t)(20 * cols));
      check(dso_unpack(many.c, &weight, 0, rows, real.data()) == 0 && dso_unpack(one.c, &weight, 30, 50, part.data()) == 0,
            "unpack: %s", dso_last_error());
      check(std::equal(part.begin(), part.end(), real.begin() + 30 * cols), "%s %s: unpacking a part", isa,
            ::format_name(k.format));
      std::vector<float> y((size_t)(T * rows)), y2(y.size());
      check(dso_linear(one.c, &weight, bias.data(), k.kind, x.data(), T, 3, y.data()) == 0 &&
                dso_linear(many.c, &weight, bias.data(), k.kind, x.data(), T, 3, y2.data()) == 0,
            "linear: %s", dso_last_error());
      check(y == y2, "%s %s: products depend on threads", isa, ::format_name(k.format));
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < rows; ++r) {
          double sum = bias[(size_t)r], size = 0;
          for (int c = 0; c < cols; ++c) {
            const double term = (double)real[(size_t)(r * cols + c)] * x[(size_t)(t * cols + c)];
            sum += term;
            size += std::fabs(term);
          }
          if (!check(std::fabs(sum - y[(size_t)(t * rows + r)]) <= k.tolerance * size, "%s %s: y[%d, %d] is %g, not %g", isa,
                     ::format_name(k.format), t, r, y[(size_t)(t * rows + r)], sum))
            return;
        }
      refuses(
          dso_linear(one.c, &weight, nullptr, k.kind == DSO_SLOT_F32 ? DSO_SLOT_Q8 : DSO_SLOT_F32, x.data(), T, 0, y.data()),
          DSO_EINVAL, "do not support", "wrong activation");
      refuses(dso_linear(one.c, &weight, nullptr, k.kind, x.data(), T, T + 1, y.data()), DSO_EINVAL, "decode_rows",
              "too many decode rows");
      refuses(dso_unpack(one.c, &weight, 0, rows + 1, real.data()), DSO_EINVAL, "of 75", "rows past the end");
    }
    for (int kind : {DSO_SLOT_BF16, DSO_SLOT_Q8, DSO_SLOT_Q16}) {
      Buffer a((size_t)(T * dso_row_bytes(kind, cols)), 0), b(a.size(), 0);
      check(dso_convert(one.c, kind, x.data(), T, cols, a.get()) == 0 &&
                dso_convert(many.c, kind, x.data(), T, cols, b.get()) == 0,
            "convert");
      check(memcmp(a.get(), b.get(), a.size()) == 0, "%s: conversion depends on threads", isa);
    }
    refuses(dso_convert(one.c, DSO_SLOT_F32, x.data(), T, cols, w.data()), DSO_EINVAL, "slot_kind is 0", "convert to F32");
    refuses(dso_pack(one.c, DSO_VECTOR, DSO_SRC_F32, w.data(), rows, cols, cols, nullptr, x.data()), DSO_EINVAL, "format 100",
            "pack a vector");
    refuses(dso_pack(one.c, DSO_INT8, 9, w.data(), rows, cols, cols, nullptr, x.data()), DSO_EINVAL, "src_type 9",
            "source type");
    refuses(dso_pack(one.c, DSO_INT8, DSO_SRC_F32, w.data(), rows, cols, cols - 1, nullptr, x.data()), DSO_EINVAL, "stride",
            "stride");
    const std::vector<float> negative(cols, -1.0f), infinite(cols, INFINITY);
    refuses(dso_pack(one.c, DSO_INT4, DSO_SRC_F32, w.data(), rows, cols, cols, negative.data(), x.data()), DSO_EINVAL,
            "importance[0] is -1", "negative importance");
    refuses(dso_pack(one.c, DSO_INT4, DSO_SRC_F32, w.data(), rows, cols, cols, infinite.data(), x.data()), DSO_EINVAL,
            "importance[0] is inf", "infinite importance");
    refuses(dso_pack(one.c, DSO_BF16, DSO_SRC_GGML, w.data(), 1, 32, 32, nullptr, x.data()), DSO_EINVAL, "BF16",
            "ggml blocks as bf16");
    refuses(dso_pack(one.c, DSO_Q5_0, DSO_SRC_F32, w.data(), 1, 32, 32, nullptr, x.data()), DSO_EINVAL,
            "Q5_0 is packed from ggml blocks only", "floats");
    refuses(dso_pack(one.c, DSO_INT8, DSO_SRC_GGML, w.data(), 1, 33, 64, nullptr, x.data()), DSO_EINVAL, "got 33 and 64",
            "columns of ggml blocks");
    refuses(dso_pack(one.c, DSO_INT8, DSO_SRC_GGML, w.data(), 1, 32, 33, nullptr, x.data()), DSO_EINVAL, "got 32 and 33",
            "stride of ggml blocks");
  }
}

// Blocks of random bytes, in buffers without a byte to spare; tests/quant compares their values with ggml's.
void ggml_blocks() {
  const int rows = 35, cols = 512;
  const std::pair<int, int> bytes_of_a_row[] = {{DSO_Q2_K, 168}, {DSO_Q3_K, 220},   {DSO_Q4_K, 288},   {DSO_Q5_K, 352},
                                                {DSO_Q6_K, 420}, {DSO_IQ4_XS, 272}, {DSO_IQ4_NL, 288}, {DSO_Q5_0, 352},
                                                {DSO_Q5_1, 384}, {DSO_MXFP4, 272}};
  for (const Variant& v : variants()) {
    OwnContext one(*v.kernels, 1), many(*v.kernels, 5);
    Random random(4);
    for (const auto& [format, row_bytes] : bytes_of_a_row) {
      const BlockFormat& f = *block_format(format);
      Buffer source((size_t)(rows * row_bytes)), packed(block_bytes(f, rows, cols)), again(packed.size());
      for (size_t i = 0; i < source.size(); ++i) source[i] = (uint8_t)random.bits();
      check(dso_pack(one.c, format, DSO_SRC_GGML, source.get(), rows, cols, cols, nullptr, packed.get()) == 0 &&
                dso_pack(many.c, format, DSO_SRC_GGML, source.get(), rows, cols, cols, nullptr, again.get()) == 0,
            "%s: %s", f.name, dso_last_error());
      check(memcmp(packed.get(), again.get(), packed.size()) == 0, "%s: repacking depends on threads", f.name);
      const dso_weight weight{format, rows, cols, 0, packed.get(), (int64_t)packed.size()};
      std::vector<float> real((size_t)(rows * cols));
      check(dso_unpack(many.c, &weight, 0, rows, real.data()) == 0, "%s: %s", f.name, dso_last_error());
      const BlockMatrix matrix = {f, packed.get(), cols};
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c) {
          const float product = matrix.scale(r, c) * (float)matrix.value(r, c);
          const float want = f.has_min ? product + matrix.min(r, c) : product, got = real[(size_t)(r * cols + c)];
          if (!check(same(got, want), "%s %s: W[%d, %d] is %g, not %g", v.name.c_str(), f.name, r, c, got, want)) return;
        }
    }
  }
}

// Block-scaled E4M3: the codes and scales that dso_pack produces from their values, for any row stride.
void e4m3_blocks() {
  OwnContext one(*variants()[0].kernels, 1), many(*variants()[0].kernels, 5);
  Random random(5);
  const int rows = 300, cols = 170, gap = 7;
  std::vector<uint8_t> codes((size_t)(rows * (cols + gap)), 0x7f);  // NaNs between the rows
  std::vector<float> scales, values((size_t)(rows * cols));
  for (int i = 0; i < 3 * 2; ++i) scales.push_back(std::ldexp(1.0f, random.below(9) - 4));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      uint8_t code = (uint8_t)(r % 128 == 5 && c % 128 == 3 ? 0x7e : random.bits());  // 448 in each block
      if ((code & 0x7f) == 0x7f) code = 0;
      codes[(size_t)(r * (cols + gap) + c)] = code;
      values[(size_t)(r * cols + c)] = e4m3_to_float(code) * scales[(size_t)(r / 128 * 2 + c / 128)];
    }
  Buffer packed(::packed_bytes(DSO_FP8, rows, cols)), again(packed.size()), rounded(packed.size());
  check(dso_pack_fp8(one.c, codes.data(), scales.data(), rows, cols, cols + gap, packed.get()) == 0 &&
            dso_pack_fp8(many.c, codes.data(), scales.data(), rows, cols, cols + gap, again.get()) == 0,
        "pack_fp8: %s", dso_last_error());
  check(dso_pack(one.c, DSO_FP8, DSO_SRC_F32, values.data(), rows, cols, cols, nullptr, rounded.get()) == 0, "pack: %s",
        dso_last_error());
  check(memcmp(packed.get(), again.get(), packed.size()) == 0, "pack_fp8 depends on threads");
  check(memcmp(packed.get(), rounded.get(), packed.size()) == 0, "pack_fp8 does not keep codes and scales");
  codes[(size_t)(200 * (cols + gap) + 140)] = 0xff;
  check(dso_pack_fp8(one.c, codes.data(), scales.data(), rows, cols, cols + gap, packed.get()) == 0, "pack_fp8 with a NaN");
  std::vector<float> back(values.size());
  const dso_weight weight{DSO_FP8, rows, cols, 0, packed.get(), (int64_t)packed.size()};
  check(dso_unpack(one.c, &weight, 0, rows, back.data()) == 0, "unpack: %s", dso_last_error());
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c)
      check(std::isnan(back[(size_t)(r * cols + c)]) == (r / 128 == 1 && c / 128 == 1), "a NaN code: (%d, %d) is %g", r, c,
            back[(size_t)(r * cols + c)]);
  refuses(dso_pack_fp8(one.c, codes.data(), scales.data(), rows, cols, cols - 1, packed.get()), DSO_EINVAL, "stride", "stride");
  refuses(dso_pack_fp8(one.c, codes.data(), nullptr, rows, cols, cols, packed.get()), DSO_EINVAL, "NULL", "no scales");
  refuses(dso_pack_fp8(one.c, codes.data(), scales.data(), 0, cols, cols, packed.get()), DSO_EINVAL, "0 x 170", "no rows");
}

}  // namespace

int main() {
  direct();
  ggml_blocks();
  e4m3_blocks();
  return report("test_matrix_api");
}
