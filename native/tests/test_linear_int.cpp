// Integer products on every variant: bitwise equal to the rule of docs/contracts.md in scalar code, for any token count, tile
// range and strides; close to the product in double; NaN and infinity are preserved; nothing is written outside. On every
// processor the same: product_bits.hpp has hashes of some results.
#include "block_layout.hpp"
#include "check.hpp"
#include "exact_fma.hpp"
#include "product_bits.hpp"

namespace {
struct Case {
  int format, kind, rows, cols;
  std::vector<uint8_t> packed;
  std::vector<float> bias;
  std::vector<std::vector<float>> x;     // [tokens][cols]
  std::vector<std::vector<float>> want;  // [tokens][rows], the recipe

  const BlockFormat* blocks() const { return block_format(format); }
  BlockMatrix matrix() const { return {*blocks(), const_cast<uint8_t*>(packed.data()), cols}; }
  const char* name() const { return blocks() ? blocks()->name : format_name(format); }
  int scale_columns() const { return blocks() ? blocks()->columns : 32; }
  bool has_min() const { return blocks() ? blocks()->has_min : format == DSO_Q4_1; }

  int code(int r, int c) const {
    if (blocks()) return matrix().value(r, c);
    int shift;
    const uint8_t byte = packed[code_at(format, r, c, cols, &shift)];
    return format == DSO_INT8 ? byte - 128 : format == DSO_INT4 ? (byte >> shift & 15) - 8 : byte >> shift & 15;
  }
  // The fp16 number of the row for column c: its scale, or the factor of its scales; field 1: the same for minimums.
  uint8_t* half(int r, int c, int field) {
    if (blocks()) return matrix().halves(r, c) + 32 * field;
    return &packed[(size_t)(r / 16 * ((cols + 31) / 32) + c / 32) * tile_bytes(format) + code_bytes(format) +
                   (size_t)(r % 16) * 2 + 32 * (size_t)field];
  }
  float number(int r, int c, int field) const {
    const uint8_t* p = const_cast<Case*>(this)->half(r, c, field);
    return half_to_float((uint16_t)(p[0] | p[1] << 8));
  }
  float scale(int r, int c) const { return blocks() ? matrix().scale(r, c) : number(r, c, 0); }
  float min(int r, int c) const { return !has_min() ? 0.0f : blocks() ? matrix().min(r, c) : number(r, c, 1); }
};

size_t size_of(int format, int rows, int cols) {
  const BlockFormat* f = block_format(format);
  return f ? block_bytes(*f, rows, cols) : packed_bytes(format, rows, cols);
}

uint16_t random_half(Random& random) {
  return (uint16_t)(random.below(2) << 15 | (8 + random.below(8)) << 10 | random.below(1024));
}

Case make(int format, int kind, int rows, int cols, int tokens, Random& random) {
  Case c{format, kind, rows, cols, std::vector<uint8_t>(size_of(format, rows, cols), 0), {}, {}, {}};
  if (c.blocks())
    for (uint8_t& byte : c.packed) byte = (uint8_t)random.bits();
  for (int r = 0; r < (rows + 15) / 16 * 16; ++r) {
    for (int k = 0; k < cols; ++k) {
      if (c.blocks() || r >= rows) break;
      int shift;
      const size_t at = code_at(format, r, k, cols, &shift);
      c.packed[at] = (uint8_t)(c.packed[at] | (format == DSO_INT8 ? random.below(256) : random.below(16) << shift));
    }
    for (int k = 0; k < cols; k += 32)
      for (int field = 0; field < (c.has_min() ? 2 : 1); ++field) {
        const uint16_t h = r < rows ? random_half(random) : 0;
        if (format == DSO_MXFP4)
          *c.matrix().byte(r, k) = (uint8_t)(120 + random.below(8));
        else if (format == DSO_INT3)
          *c.matrix().byte(r, k) = (uint8_t)((h & 0x7fff) >> 7);
        else
          memcpy(c.half(r, k, field), &h, 2);
      }
    if (r < rows) c.bias.push_back(random.normal());
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
      for (int begin = 0; begin < wp; begin += c.scale_columns()) {
        const float a_scale = a.scale(begin / 32), scale = c.scale(r, begin), min = c.min(r, begin);
        int64_t dot = 0, sum = 0;
        for (int i = begin; i < begin + c.scale_columns() && i < c.cols; ++i) {
          dot += c.code(r, i) * a.code(i);
          sum += a.code(i);
          const double w = (double)scale * c.code(r, i) + min;
          exact += w * x[(size_t)i];
          error += std::fabs(w) * (0.501 * a_scale + 2e-6 * std::fabs(x[(size_t)i]));  // half a step each, and fp32 sums
          if (c.has_min()) error += 1e-6 * (std::fabs(min) + std::fabs(scale) * 31) * std::fabs(x[(size_t)i]);
        }
        check(std::abs(dot) <= INT32_MAX, "a dot leaves int32");
        acc = exact_fma((float)dot, scale * a_scale, acc);
        if (c.has_min()) acc = exact_fma(min * a_scale, (float)sum, acc);
      }
      if (std::isfinite(exact))
        check(std::fabs(acc - exact) <= error + 1e-30, "%s kind %d: the recipe gives %g for %g (bound %g)", c.name(), c.kind,
              acc, exact, error);
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
                 what, c.name(), c.kind, c.rows, c.cols, run.T, run.tile_begin, run.tile_end, t, r, got, want))
        return;
    }
}

constexpr int formats[] = {DSO_INT8, DSO_INT3, DSO_INT4,   DSO_Q4_1,   DSO_Q2_K, DSO_Q3_K, DSO_Q4_K,
                           DSO_Q5_K, DSO_Q6_K, DSO_IQ4_XS, DSO_IQ4_NL, DSO_Q5_0, DSO_Q5_1, DSO_MXFP4},
              kinds[] = {DSO_SLOT_Q8, DSO_SLOT_Q16};

void shapes(const std::vector<Variant>& all, int format, int kind) {
  Random random(11 + (uint64_t)format * 7 + (uint64_t)kind);
  const std::vector<int> dims =
      test_divisor() > 1 ? std::vector<int>{1, 17, 33, 100} : std::vector<int>{1, 15, 16, 17, 31, 32, 33, 61, 100};
  const bool blocks = block_format(format) && format != DSO_INT3;
  for (int rows : blocks ? std::vector<int>{1, 17, 61} : dims)
    for (int cols : blocks ? std::vector<int>{256, 512} : dims) {
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
  // More groups than a panel holds, more tiles than a super-panel; every token count. Emulated, the reference takes most time.
  const bool emulated = test_divisor() > 1;
  const int tiles = emulated ? 6 : 14, tokens = emulated ? 22 : 40;
  Case c = make(format, kind, 16 * (tiles - 1) + 5, blocks ? 768 : 577, tokens, random);
  reference(c, *all[0].kernels);
  for (const Variant& v : all)
    for (int T = 1; T <= tokens; T += every(7))
      compare(v, c, {T, T % (tiles / 2 - 2), tiles - T % 3, 0, 3, true, false}, "tokens");
  // More tokens than a super-panel.
  const int most = emulated ? 70 : 270;
  Case many = make(format, kind, 40, blocks ? 256 : 33, most, random);
  reference(many, *all[0].kernels);
  for (const Variant& v : all) compare(v, many, {most, 0, 3, 0, 1, true, true}, "many tokens");
}

void extremes(const std::vector<Variant>& all, int format, int kind) {  // the largest sums: no dot may saturate or wrap
  Random random(5);
  for (int code : {0, 255})
    for (int sign : {1, -1, 0}) {
      Case c = make(format, kind, 17, block_format(format) ? 256 : 96, 10, random);
      for (int r = 0; r < c.rows; ++r)
        for (int k = 0; k < c.cols; ++k) {
          if (const BlockFormat* f = c.blocks()) {
            memset(c.packed.data() + c.matrix().group(r, k), code, (size_t)(64 * (f->low + f->high)));
            continue;
          }
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
    for (int at = 0; at < 70; at += (block_format(format) ? 11 : 1) * every(5)) {
      // In an activation: that token's outputs are NaN, the others are whole.
      Case c = make(format, kind, 33, block_format(format) ? 256 : 70, 12, random);
      const int token = at % 12;
      c.x[(size_t)token][(size_t)at] = bad;
      reference(c, *all[0].kernels);
      for (float y : c.want[(size_t)token])
        check(std::isnan(y), "%s kind %d: %g at column %d was lost: %g", c.name(), kind, bad, at, y);
      for (const Variant& v : all) {
        compare(v, c, {12, 0, 3, 0, 0, true, false}, "bad activation");
        compare(v, c, {token % 8 + 1, 0, 3, 0, 0, true, false}, "bad activation");
      }
    }
  if (format == DSO_MXFP4) return;  // its scales are finite
  for (uint16_t bad : {0x7e00, 0x7c00, 0xfc00})
    for (int row = 0; row < 20; row += every(7)) {  // in a weight's scale or min: that row's outputs are not finite
      Case c = make(format, kind, 20, block_format(format) ? 256 : 70, 9, random);
      if (format == DSO_INT3)
        *c.matrix().byte(row, 32 * (row % 3)) = (uint8_t)(bad >> 7);
      else
        memcpy(c.half(row, 32 * (row % 3), c.has_min() ? row % 2 : 0), &bad, 2);
      reference(c, *all[0].kernels);
      for (const auto& y : c.want)
        for (int r = 0; r < 20; ++r)
          check(std::isfinite(y[(size_t)r]) == (r != row), "%s kind %d: scale %04x of row %d, row %d: %g", c.name(), kind, bad,
                row, r, y[(size_t)r]);
      for (const Variant& v : all)
        for (int T : {2, 9}) compare(v, c, {T, 0, 2, 0, 0, true, false}, "bad weight");
    }
}
// The results of a matrix with 1 and with 13 tokens have the bits that product_bits.hpp records.
void recorded(const std::vector<Variant>& all, int format, int kind) {
  Random random(29 + (uint64_t)format);
  const int rows = 37, cols = block_format(format) ? 512 : 300;
  Case c = make(format, kind, rows, cols, 13, random);
  for (const Variant& v : all) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (int T : {1, 13}) {
      const int64_t x_stride = (int64_t)row_bytes(kind, cols), y_stride = 4 * rows;
      Buffer x((size_t)(T * x_stride)), y((size_t)(T * y_stride)), scratch(v.kernels->linear_scratch);
      for (int t = 0; t < T; ++t) v.kernels->convert(kind, c.x[(size_t)t].data(), 0, cols, cols, x.get() + t * x_stride);
      v.kernels->linear({format, rows, cols, c.packed.data()}, c.bias.data(), kind, x.get(), x_stride, T, false, 0, 3,
                        (float*)y.get(), y_stride, scratch.get());
      for (size_t i = 0; i < y.size(); ++i) hash = (hash ^ y[i]) * 0x100000001b3u;
    }
    if (getenv("DSO_PRINT_BITS")) {
      printf("    {%d, %d, 0x%016llx},  // %s\n", format, kind, (unsigned long long)hash, c.name());
      return;
    }
    bool found = false;
    for (const ProductBits& bits : product_bits)
      found = found || (bits.format == format && bits.kind == kind && bits.hash == hash);
    check(found, "%s %s kind %d: the hash of its results, %016llx, is not in product_bits.hpp", v.name.c_str(), c.name(), kind,
          (unsigned long long)hash);
  }
}
}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  if (all.empty()) return report("test_linear_int");
  for (int format : formats)
    for (int kind : kinds) {
      recorded(all, format, kind);
      if (getenv("DSO_PRINT_BITS")) continue;
      shapes(all, format, kind);
      extremes(all, format, kind);
      not_finite(all, format, kind);
    }
  return report("test_linear_int");
}
