// F32, BF16 and FP8 products on every variant: close to the product in double, the exact chain where its order is guaranteed,
// bitwise equal for any token count, tile range and strides; NaN and infinity are preserved; nothing is read past a row's
// columns or written outside.
#include <algorithm>

#include "check.hpp"
#include "exact_fma.hpp"

namespace {
constexpr int formats[] = {DSO_F32, DSO_BF16, DSO_FP8};

struct Case {
  int format, rows, cols, tokens;
  std::vector<float> w, x,
      bias;  // as rounded to the format (FP8: to bf16, until it is packed): [rows][cols], [tokens][cols], [rows]
  std::vector<uint8_t> packed;

  int kind() const { return format == DSO_F32 ? DSO_SLOT_F32 : DSO_SLOT_BF16; }
};

float to_format(int format, float x) {
  return format == DSO_F32 ? x : from_bits((to_bits(x) + 0x7fff + (to_bits(x) >> 16 & 1)) & 0xffff0000);
}

Case make(int format, int rows, int cols, int tokens, Random& random) {
  Case c{format, rows, cols, tokens, {}, {}, {}, {}};
  for (int i = 0; i < rows * cols; ++i) c.w.push_back(to_format(format, random.normal()));
  for (int i = 0; format == DSO_FP8 && i < rows * cols; i += 3)
    c.w[(size_t)i] = std::ldexp(c.w[(size_t)i], -random.below(20));  // subnormals of E4M3
  for (int i = 0; i < tokens * cols; ++i) c.x.push_back(to_format(format, random.normal()));
  for (int i = 0; i < rows; ++i) c.bias.push_back(random.normal());
  return c;
}

void pack(Case& c, const Kernels& k) {
  c.packed.resize(packed_bytes(c.format, c.rows, c.cols));
  const int bands = (c.rows + band_rows(c.format) - 1) / band_rows(c.format);
  for (int band = 0; band < bands; ++band)
    k.pack_tile(c.format, DSO_SRC_F32, c.w.data(), c.rows, c.cols, 4 * c.cols, nullptr, band, c.packed.data());
  if (c.format == DSO_FP8) k.unpack_rows({c.format, c.rows, c.cols, c.packed.data()}, 0, c.rows, c.w.data(), 4 * c.cols);
}

struct Run {
  int token, T, tile_begin, tile_end, x_gap = 0, y_gap = 0;
  bool bias = false, prefill = false;
};

// Outputs [T][rows]; those outside the requested tiles are checked to be untouched, and returned unchanged.
std::vector<float> run(const Variant& v, const Case& c, const Run& r) {
  const size_t width = row_bytes(c.kind(), c.cols), x_stride = width + 64 * (size_t)r.x_gap,
               y_stride = 4 * (size_t)(c.rows + r.y_gap);
  // Rows end at the end of their slot row. The memory past the columns of an F32 row is NaN, and must not matter.
  Buffer x((size_t)(r.T - 1) * x_stride + (c.format == DSO_F32 ? 4 * (size_t)c.cols : width), 0xff), data(c.packed.size());
  Buffer y((size_t)(r.T - 1) * y_stride + 4 * (size_t)c.rows), scratch(v.kernels->linear_scratch);
  memcpy(data.get(), c.packed.data(), c.packed.size());
  for (int t = 0; t < r.T; ++t) {
    const float* from = &c.x[(size_t)(r.token + t) * (size_t)c.cols];
    uint8_t* to = x.get() + (size_t)t * x_stride;
    if (c.format == DSO_F32)
      memcpy(to, from, 4 * (size_t)c.cols);
    else
      v.kernels->convert(DSO_SLOT_BF16, from, 0, c.cols, c.cols, to);
  }
  v.kernels->linear({c.format, c.rows, c.cols, data.get()}, r.bias ? c.bias.data() : nullptr, c.kind(), x.get(),
                    (int64_t)x_stride, r.T, r.prefill, r.tile_begin, r.tile_end, (float*)y.get(), (int64_t)y_stride,
                    scratch.get());
  std::vector<float> out;
  for (int t = 0; t < r.T; ++t)
    for (int n = 0; n < c.rows + r.y_gap; ++n) {
      const size_t at = (size_t)t * y_stride + 4 * (size_t)n;
      if (at + 4 > y.size()) break;
      float value;
      memcpy(&value, y.get() + at, 4);
      const bool inside = n < c.rows && n >= 16 * r.tile_begin && n < 16 * r.tile_end;
      if (!inside)
        check(to_bits(value) == 0xa5a5a5a5, "%s %s [%d x %d] T %d tiles %d..%d: token %d output %d was written", v.name.c_str(),
              format_name(c.format), c.rows, c.cols, r.T, r.tile_begin, r.tile_end, t, n);
      if (n < c.rows) out.push_back(value);
    }
  return out;
}

// Every row alone, over all tiles, without bias: all other calls must give the same.
std::vector<float> alone(const Variant& v, const Case& c, bool prefill) {
  std::vector<float> out;
  for (int t = 0; t < c.tokens; ++t) {
    const std::vector<float> y = run(v, c, {t, 1, 0, (c.rows + 15) / 16, 0, 0, false, prefill});
    out.insert(out.end(), y.begin(), y.end());
  }
  return out;
}

// The guaranteed chain: over all columns, or, for FP8, over 128 columns of code values at a time, times the block's scale.
float chain(const Case& c, int t, int n) {
  float acc = 0, sum = 0;
  for (int k = 0; k < c.cols; ++k) {
    const float a = c.x[(size_t)(t * c.cols + k)];
    if (c.format != DSO_FP8) {
      acc = exact_fma(c.w[(size_t)(n * c.cols + k)], a, acc);
      continue;
    }
    int shift;
    const size_t at = code_at(c.format, n, k, c.cols, &shift);
    float scale;
    memcpy(&scale, &c.packed[at / 544 * 544 + 512], 4);
    sum = exact_fma(e4m3_to_float(c.packed[at]), a, sum);
    if (k % 128 == 127 || k == c.cols - 1) acc = exact_fma(sum, scale, acc), sum = 0;
  }
  return acc;
}

// It is promised to the bit but where an instruction of its own adds pairs (BF16 and FP8, see has_dot_bf16).
bool chained(const Variant& v, int format) { return format == DSO_F32 || !has_dot_bf16(v.name); }

void near_double(const Variant& v, const Case& c, const std::vector<float>& y) {
  for (int t = 0; t < c.tokens; ++t)
    for (int n = 0; n < c.rows; ++n) {
      double exact = 0, magnitude = 0;
      for (int k = 0; k < c.cols; ++k) {
        const float a = c.x[(size_t)(t * c.cols + k)], b = c.w[(size_t)(n * c.cols + k)];
        exact += (double)a * b;
        magnitude += std::fabs((double)a * b);
      }
      const float got = y[(size_t)(t * c.rows + n)];
      const double bound = (c.cols + 2) * std::ldexp(1.0, -24) * magnitude + 1e-37;
      if (!check(std::fabs(got - exact) <= bound, "%s %s [%d x %d] token %d output %d: %g for %g (bound %g)", v.name.c_str(),
                 format_name(c.format), c.rows, c.cols, t, n, got, exact, bound))
        return;
      if (chained(v, c.format) &&
          !check(to_bits(got) == to_bits(chain(c, t, n)), "%s %s [%d x %d] token %d output %d: %.9g, the chain gives %.9g",
                 v.name.c_str(), format_name(c.format), c.rows, c.cols, t, n, got, chain(c, t, n)))
        return;
    }
}

void repeats(const Variant& v, const Case& c, const std::vector<float>& want, const Run& r) {
  const std::vector<float> got = run(v, c, r);
  for (int t = 0; t < r.T; ++t)
    for (int n = 16 * r.tile_begin; n < std::min(c.rows, 16 * r.tile_end); ++n) {
      const float once = want[(size_t)((r.token + t) * c.rows + n)], expected = r.bias ? once + c.bias[(size_t)n] : once;
      const float value = got[(size_t)(t * c.rows + n)];
      if (!check(same(value, expected), "%s %s [%d x %d] T %d tiles %d..%d prefill %d: token %d output %d is %.9g, alone %.9g",
                 v.name.c_str(), format_name(c.format), c.rows, c.cols, r.T, r.tile_begin, r.tile_end, r.prefill, t, n, value,
                 expected))
        return;
    }
}

void shapes(const std::vector<Variant>& all, int format) {
  Random random(7 + (uint64_t)format);
  const int dims[] = {1, 2, 15, 16, 17, 31, 33, 61, 100};
  for (int rows : dims)
    for (int cols : dims) {
      Case c = make(format, rows, cols, 14, random);
      pack(c, *all[0].kernels);
      const int tiles = (rows + 15) / 16;
      for (const Variant& v : all)
        for (bool prefill : {false, true}) {
          const std::vector<float> want = alone(v, c, prefill);
          near_double(v, c, want);
          const int begin = random.below(tiles), end = begin + 1 + random.below(tiles - begin), T = 1 + random.below(14);
          repeats(v, c, want, {14 - T, T, 0, tiles, 0, 0, false, prefill});
          repeats(v, c, want, {0, T, begin, end, random.below(3), random.below(5), true, prefill});
        }
    }
}

void tokens(const std::vector<Variant>& all, int format) {  // every T; more columns than two panels, more tiles than a block
  Random random(8);
  Case c = make(format, 9 * 16 + 3, 997, 70, random);
  pack(c, *all[0].kernels);
  for (const Variant& v : all)
    for (bool prefill : {false, true}) {
      const std::vector<float> want = alone(v, c, prefill);
      near_double(v, c, want);
      for (int T = 1; T <= 70; T += T < 20 ? every(5) : 7)
        repeats(v, c, want, {70 - T, T, T % 4, 10 - T % 3, T % 2, 1, true, prefill});
    }
}

void not_finite(const std::vector<Variant>& all, int format) {
  Random random(9);
  for (float bad : {(float)NAN, (float)INFINITY, -(float)INFINITY})
    for (int at = 0; at < 70; at += 3 * every(5)) {
      Case c = make(format, 20, 70, 13, random);
      const int token = at % 13, row = at % 20;
      c.x[(size_t)(token * 70 + at)] = bad;
      Case d = make(format, 20, 70, 13, random);
      d.w[(size_t)(row * 70 + at)] = bad;
      pack(c, *all[0].kernels), pack(d, *all[0].kernels);
      for (const Variant& v : all)
        for (int T : {3, 13}) {
          const int first = std::min(token, 13 - T);
          const std::vector<float> y = run(v, c, {first, T, 0, 2, 0, 0, true, T == 13}),
                                   z = run(v, d, {0, T, 0, 2, 0, 0, true, T == 13});
          for (int t = 0; t < T; ++t)
            for (int n = 0; n < 20; ++n) {
              check(std::isfinite(y[(size_t)(t * 20 + n)]) == (first + t != token),
                    "%s %s: %g at column %d of token %d, token %d: %g", v.name.c_str(), format_name(format), bad, at, token,
                    first + t, y[(size_t)(t * 20 + n)]);
              check(std::isfinite(z[(size_t)(t * 20 + n)]) == (n != row && format != DSO_FP8),
                    "%s %s: %g at column %d of output %d, output %d: %g", v.name.c_str(), format_name(format), bad, at, row, n,
                    z[(size_t)(t * 20 + n)]);
            }
        }
    }
}
}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  if (all.empty()) return report("test_linear_float");
  for (int format : formats) {
    shapes(all, format);
    tokens(all, format);
    not_finite(all, format);
  }
  return report("test_linear_float");
}
