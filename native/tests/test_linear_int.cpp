// Integer products on every variant: bitwise equal to the rule of docs/contracts.md in scalar code, for any token count, tile
// range and strides; close to the product in double; NaN and infinity are preserved; nothing is written outside.
#include "check.hpp"

namespace {
struct Case {
  int format, kind, rows, cols;
  std::vector<uint8_t> packed;
  std::vector<float> bias;
  std::vector<std::vector<float>> x;     // [tokens][cols]
  std::vector<std::vector<float>> want;  // [tokens][rows], the recipe

  int code(int r, int c) const {
    int shift;
    const uint8_t byte = packed[code_at(format, r, c, cols, &shift)];
    return format == DSO_INT8 ? byte - 128 : format == DSO_INT4 ? (byte >> shift & 15) - 8 : byte >> shift & 15;
  }
  size_t scale_at(int r, int g) const {
    return (size_t)(r / 16 * ((cols + 31) / 32) + g) * tile_bytes(format) + code_bytes(format) + (size_t)(r % 16) * 2;
  }
  float half(size_t at) const { return half_to_float((uint16_t)(packed[at] | packed[at + 1] << 8)); }
  float scale(int r, int g) const { return half(scale_at(r, g)); }
  float min(int r, int g) const { return format == DSO_Q4_1 ? half(scale_at(r, g) + 32) : 0.0f; }
};

uint16_t random_half(Random& random) {
  return (uint16_t)(random.below(2) << 15 | (8 + random.below(8)) << 10 | random.below(1024));
}

Case make(int format, int kind, int rows, int cols, int tokens, Random& random) {
  Case c{format, kind, rows, cols, std::vector<uint8_t>(packed_bytes(format, rows, cols), 0), {}, {}, {}};
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < cols; ++k) {
      int shift;
      const size_t at = code_at(format, r, k, cols, &shift);
      c.packed[at] = (uint8_t)(c.packed[at] | (format == DSO_INT8 ? random.below(256) : random.below(16) << shift));
    }
    for (int g = 0; g < (cols + 31) / 32; ++g)
      for (int field = 0; field < (format == DSO_Q4_1 ? 2 : 1); ++field) {
        const uint16_t h = random_half(random);
        memcpy(&c.packed[c.scale_at(r, g) + 32 * (size_t)field], &h, 2);
      }
    c.bias.push_back(random.normal());
  }
  for (int t = 0; t < tokens; ++t) {
    c.x.emplace_back();
    for (int k = 0; k < cols; ++k) c.x.back().push_back(random.normal());
  }
  return c;
}

// The values of a slot row.
struct Row {
  const uint8_t* bytes;
  int kind, wp;
  int code(int i) const { return kind == DSO_SLOT_Q8 ? (int8_t)bytes[i] : 256 * (int8_t)bytes[i] + (int8_t)bytes[wp + i]; }
  float scale(int g) const {
    float s;
    memcpy(&s, bytes + wp * (kind == DSO_SLOT_Q8 ? 1 : 2) + 4 * g, 4);
    return s;
  }
};

void reference(Case& c, const Kernels& k) {
  const int wp = (c.cols + 31) / 32 * 32;
  std::vector<uint8_t> bytes(row_bytes(c.kind, c.cols));
  c.want.clear();
  for (const std::vector<float>& x : c.x) {
    k.convert(c.kind, x.data(), 0, c.cols, c.cols, bytes.data());
    const Row a{bytes.data(), c.kind, wp};
    c.want.emplace_back();
    for (int r = 0; r < c.rows; ++r) {
      float acc = 0;
      double exact = 0, error = 0;
      for (int g = 0; g < wp / 32; ++g) {
        int64_t dot = 0, sum = 0;
        for (int i = 32 * g; i < 32 * g + 32 && i < c.cols; ++i) {
          dot += c.code(r, i) * a.code(i);
          sum += a.code(i);
          const double w = (double)c.scale(r, g) * c.code(r, i) + c.min(r, g);
          exact += w * x[(size_t)i];
          error += std::fabs(w) * (0.501 * a.scale(g) + 2e-6 * std::fabs(x[(size_t)i]));  // half a step each, and fp32 sums
          if (c.format == DSO_Q4_1)
            error += 1e-6 * (std::fabs(c.min(r, g)) + std::fabs(c.scale(r, g)) * 15) * std::fabs(x[(size_t)i]);
        }
        check(std::abs(dot) <= INT32_MAX, "a dot leaves int32");
        acc = std::fmaf((float)dot, c.scale(r, g) * a.scale(g), acc);
        if (c.format == DSO_Q4_1) acc = std::fmaf(c.min(r, g) * a.scale(g), (float)sum, acc);
      }
      if (std::isfinite(exact))
        check(std::fabs(acc - exact) <= error + 1e-30, "%s kind %d: the recipe gives %g for %g (bound %g)",
              format_name(c.format), c.kind, acc, exact, error);
      c.want.back().push_back(acc);
    }
  }
}

struct Run {
  int T, tile_begin, tile_end, x_gap, y_gap;
  bool bias, prefill;
};

void compare(const Variant& v, const Case& c, const Run& run, const char* what) {
  const int64_t x_stride = (int64_t)row_bytes(c.kind, c.cols) + 64 * run.x_gap, y_stride = 4 * (c.rows + run.y_gap);
  Buffer x((size_t)(run.T * x_stride)), y((size_t)((run.T - 1) * y_stride) + 4 * (size_t)c.rows),
      scratch(v.kernels->linear_scratch), data(c.packed.size());
  memcpy(data.get(), c.packed.data(), c.packed.size());
  for (int t = 0; t < run.T; ++t) v.kernels->convert(c.kind, c.x[(size_t)t].data(), 0, c.cols, c.cols, x.get() + t * x_stride);
  const Matrix w = {c.format, c.rows, c.cols, data.get()};
  v.kernels->linear(w, run.bias ? c.bias.data() : nullptr, c.kind, x.get(), x_stride, run.T, run.prefill, run.tile_begin,
                    run.tile_end, (float*)y.get(), y_stride, scratch.get());
  for (int t = 0; t < run.T; ++t)
    for (int r = 0; r < c.rows + run.y_gap; ++r) {
      const size_t at = (size_t)(t * y_stride + 4 * r);
      if (at + 4 > y.size()) break;
      float got;
      memcpy(&got, y.get() + at, 4);
      const bool inside = r < c.rows && r >= 16 * run.tile_begin && r < 16 * run.tile_end;
      const float want = !inside    ? from_bits(0xa5a5a5a5)
                         : run.bias ? c.want[(size_t)t][(size_t)r] + c.bias[(size_t)r]
                                    : c.want[(size_t)t][(size_t)r];
      if (!check(same(got, want), "%s %s %s kind %d [%d x %d] T %d tiles %d..%d, token %d row %d: %g, not %g", v.name.c_str(),
                 what, format_name(c.format), c.kind, c.rows, c.cols, run.T, run.tile_begin, run.tile_end, t, r, got, want))
        return;
    }
}

constexpr int formats[] = {DSO_INT8, DSO_INT4, DSO_Q4_1}, kinds[] = {DSO_SLOT_Q8, DSO_SLOT_Q16};

void shapes(const std::vector<Variant>& all, int format, int kind) {
  Random random(11 + (uint64_t)format * 7 + (uint64_t)kind);
  const int dims[] = {1, 15, 16, 17, 31, 32, 33, 61, 100};
  for (int rows : dims)
    for (int cols : dims) {
      Case c = make(format, kind, rows, cols, 13, random);
      reference(c, *all[0].kernels);
      const int tiles = (rows + 15) / 16;
      for (const Variant& v : all)
        for (int T : {1, 1 + random.below(8), 9 + random.below(5)}) {
          const int begin = random.below(tiles), end = begin + 1 + random.below(tiles - begin);
          compare(v, c, {T, 0, tiles, 0, 0, false, T > 4}, "shape");
          compare(v, c, {T, begin, end, random.below(3), random.below(5), true, T <= 4}, "range");
        }
    }
  // More groups than a panel holds, more tiles than a super-panel; every token count.
  Case c = make(format, kind, 13 * 16 + 5, 577, 40, random);
  reference(c, *all[0].kernels);
  for (const Variant& v : all)
    for (int T = 1; T <= 40; ++T) compare(v, c, {T, T % 5, 14 - T % 3, 0, 3, true, false}, "tokens");
  // More tokens than a super-panel.
  Case many = make(format, kind, 40, 33, 270, random);
  reference(many, *all[0].kernels);
  for (const Variant& v : all) compare(v, many, {270, 0, 3, 0, 1, true, true}, "many tokens");
}

void extremes(const std::vector<Variant>& all, int format, int kind) {  // the largest sums: no dot may saturate or wrap
  Random random(5);
  for (int code : {0, 255})
    for (int sign : {1, -1, 0}) {
      Case c = make(format, kind, 17, 96, 10, random);
      for (int r = 0; r < c.rows; ++r)
        for (int k = 0; k < c.cols; ++k) {
          int shift;
          const size_t at = code_at(format, r, k, c.cols, &shift);
          c.packed[at] = (uint8_t)(format == DSO_INT8 ? code : (c.packed[at] & ~(15 << shift)) | (code & 15) << shift);
        }
      for (auto& x : c.x)
        for (float& e : x) e = sign ? (float)sign : random.below(2) ? 1.0f : -1.0f;
      reference(c, *all[0].kernels);
      for (const Variant& v : all)
        for (int T : {1, 3, 10}) compare(v, c, {T, 0, 2, 0, 0, false, false}, "extreme");
    }
}

void not_finite(const std::vector<Variant>& all, int format, int kind) {
  Random random(3);
  for (float bad : {(float)NAN, (float)INFINITY, -(float)INFINITY})
    for (int at = 0; at < 70; ++at) {  // in an activation: that token's outputs are NaN, the others are whole
      Case c = make(format, kind, 33, 70, 12, random);
      const int token = at % 12;
      c.x[(size_t)token][(size_t)at] = bad;
      reference(c, *all[0].kernels);
      for (float y : c.want[(size_t)token])
        check(std::isnan(y), "%s kind %d: %g at column %d was lost: %g", format_name(format), kind, bad, at, y);
      for (const Variant& v : all) {
        compare(v, c, {12, 0, 3, 0, 0, true, false}, "bad activation");
        compare(v, c, {token % 8 + 1, 0, 3, 0, 0, true, false}, "bad activation");
      }
    }
  for (uint16_t bad : {0x7e00, 0x7c00, 0xfc00})
    for (int row = 0; row < 20; ++row) {  // in a weight's scale or min: that row's outputs are not finite
      Case c = make(format, kind, 20, 70, 9, random);
      const int field = format == DSO_Q4_1 ? row % 2 : 0;
      memcpy(&c.packed[c.scale_at(row, row % 3) + 32 * (size_t)field], &bad, 2);
      reference(c, *all[0].kernels);
      for (const auto& y : c.want)
        for (int r = 0; r < 20; ++r)
          check(std::isfinite(y[(size_t)r]) == (r != row), "%s kind %d: scale %04x of row %d, row %d: %g", format_name(format),
                kind, bad, row, r, y[(size_t)r]);
      for (const Variant& v : all)
        for (int T : {2, 9}) compare(v, c, {T, 0, 2, 0, 0, true, false}, "bad weight");
    }
}
}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  if (all.empty()) return report("test_linear_int");
  for (int format : formats)
    for (int kind : kinds) {
      shapes(all, format, kind);
      extremes(all, format, kind);
      not_finite(all, format, kind);
    }
  return report("test_linear_int");
}
