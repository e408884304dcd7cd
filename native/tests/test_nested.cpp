// INT8_NESTED and INT4_NESTED on every variant: the bytes of the packing rule; products, unpacked and embedded rows with the
// bits of an INT8 and of an INT4 matrix that hold the same codes and scales; and the product in double.
#include <algorithm>

#include "pack_rule.hpp"

namespace {
struct Codes {  // W = scale * q, with q in [-128, 119] and one scale for 32 columns
  int rows, cols;
  std::vector<int> q;           // [rows][cols]
  std::vector<uint16_t> steps;  // [rows][groups], fp16: 16 scales
  int groups() const { return (cols + 31) / 32; }
  int at(int r, int c) const { return r < rows && c < cols ? q[(size_t)(r * cols + c)] : 0; }
  uint16_t step(int r, int g) const { return r < rows ? steps[(size_t)(r * groups() + g)] : 0; }
  static int upper(int q) { return (q + 136) / 16 - 8; }  // the nearest multiple of 16, halves upwards
};

size_t bytes_of(const Codes& c, size_t tile) { return (size_t)((c.rows + 15) / 16 * c.groups()) * tile; }
void put(uint8_t* to, uint16_t x) { memcpy(to, &x, 2); }

// A matrix in tiles of 544 bytes, as dso.h says.
std::vector<uint8_t> nested(const Codes& c) {
  std::vector<uint8_t> out(bytes_of(c, 544), 0);
  for (int r = 0; r < (c.rows + 15) / 16 * 16; ++r)
    for (int k = 0; k < 32 * c.groups(); ++k) {
      const int g = k / 32, code = c.at(r, k) + 136, shift = k / 4 % 2 * 4;
      uint8_t* const row = out.data() + (size_t)(r / 16 * c.groups()) * 544;
      const size_t place = (size_t)(k % 32 / 8 * 64 + r % 16 * 4 + k % 4);
      uint8_t& high = row[(size_t)g * 288 + place];
      uint8_t& low = row[(size_t)c.groups() * 288 + (size_t)g * 256 + place];
      high = (uint8_t)(high | code / 16 << shift), low = (uint8_t)(low | code % 16 << shift);
      put(row + (size_t)g * 288 + 256 + 2 * (r % 16), c.step(r, g));
    }
  return out;
}

// The same codes as INT8, or their upper parts as INT4.
std::vector<uint8_t> plain(const Codes& c, int format) {
  const size_t tile = (size_t)tile_bytes(format);
  std::vector<uint8_t> out(bytes_of(c, tile), 0);
  for (int r = 0; r < (c.rows + 15) / 16 * 16; ++r)
    for (int k = 0; k < 32 * c.groups(); ++k) {
      int shift;
      const size_t at = code_at(format, r, k, c.cols, &shift);
      const int q = c.at(r, k);
      out[at] = (uint8_t)(out[at] | (format == DSO_INT8 ? q + 128 : (Codes::upper(q) + 8) << shift));
      const uint16_t step = c.step(r, k / 32);
      put(&out[at / tile * tile + code_bytes(format) + (size_t)(2 * (r % 16))],
          format == DSO_INT8 ? to_half(half_to_float(step) / 16) : step);
    }
  return out;
}

Codes random_codes(int rows, int cols, Random& random) {
  Codes c{rows, cols, {}, {}};
  const int extreme = random.below(4);  // all codes at one end
  for (int i = 0; i < rows * cols; ++i) c.q.push_back(extreme == 0 ? -128 : extreme == 1 ? 119 : random.below(248) - 128);
  for (int i = 0; i < rows * c.groups(); ++i)
    c.steps.push_back((uint16_t)(random.below(2) << 15 | (10 + random.below(8)) << 10 | random.below(1024)));
  return c;
}

struct Run {
  int kind, T, begin, end, gap;
};

std::vector<uint8_t> product(const Kernels& k, int format, const Codes& c, const std::vector<uint8_t>& packed,
                             const std::vector<float>& x, const Run& run) {
  const int64_t x_stride = (int64_t)row_bytes(run.kind, c.cols), y_stride = 4 * (c.rows + run.gap);
  Buffer data(packed.size()), rows((size_t)(run.T * x_stride)), y((size_t)(run.T * y_stride)), scratch(k.linear_scratch);
  memcpy(data.get(), packed.data(), packed.size());
  for (int t = 0; t < run.T; ++t) k.convert(run.kind, &x[(size_t)(t * c.cols)], 0, c.cols, c.cols, rows.get() + t * x_stride);
  k.linear({format, c.rows, c.cols, data.get()}, nullptr, run.kind, rows.get(), x_stride, run.T, false, run.begin, run.end,
           (float*)y.get(), y_stride, scratch.get());
  return {y.get(), y.get() + y.size()};
}

void products(const Variant& v, int rows, int cols, int T, Random& random) {
  const Codes c = random_codes(rows, cols, random);
  const std::vector<uint8_t> packed = nested(c);
  std::vector<float> x((size_t)(T * cols));
  for (float& e : x) e = random.normal();
  const int tiles = (rows + 15) / 16, begin = random.below(tiles), end = begin + 1 + random.below(tiles - begin);
  for (const auto& [format, same_as] : {std::pair{DSO_INT8_NESTED, DSO_INT8}, std::pair{DSO_INT4_NESTED, DSO_INT4}}) {
    const std::vector<uint8_t> other = plain(c, same_as);
    for (int kind : {DSO_SLOT_Q8, DSO_SLOT_Q16}) {
      const Run run{kind, T, begin, end, random.below(3)};
      const auto got = product(*v.kernels, format, c, packed, x, run), want = product(*v.kernels, same_as, c, other, x, run);
      check(got == want, "%s: format %d, kind %d, %d x %d, %d tokens, tiles %d..%d: not the bits of format %d", v.name.c_str(),
            format, kind, rows, cols, T, begin, end, same_as);
    }
    std::vector<float> got((size_t)(rows * cols)), want(got.size()), one((size_t)cols);
    v.kernels->unpack_rows({format, rows, cols, packed.data()}, 0, rows, got.data(), 4 * cols);
    v.kernels->unpack_rows({same_as, rows, cols, other.data()}, 0, rows, want.data(), 4 * cols);
    check(got == want, "%s: format %d, %d x %d: unpacked values differ", v.name.c_str(), format, rows, cols);
    const int row = random.below(rows);
    v.kernels->embed_row({format, rows, cols, packed.data()}, row, 2.0f, one.data());
    for (int k = 0; k < cols; ++k)
      if (!check(one[(size_t)k] == 2 * want[(size_t)(row * cols + k)], "%s: format %d: embedded row", v.name.c_str(), format))
        return;
  }
}

// Against the sum in double of what the codes mean, for rows in 16 bits: an error of the test's own layouts would not be seen
// above.
void in_double(const Variant& v, Random& random) {
  const Codes c = random_codes(37, 71, random);
  std::vector<float> x((size_t)c.cols);
  for (float& e : x) e = random.normal();
  const auto bytes = product(*v.kernels, DSO_INT8_NESTED, c, nested(c), x, {DSO_SLOT_Q16, 1, 0, 3, 0});
  for (int r = 0; r < c.rows; ++r) {
    double want = 0, all = 0;
    for (int k = 0; k < c.cols; ++k) {
      const double term = half_to_float(c.step(r, k / 32)) / 16.0 * c.at(r, k) * x[(size_t)k];
      want += term, all += std::fabs(term);
    }
    float got;
    memcpy(&got, &bytes[(size_t)(4 * r)], 4);
    check(std::fabs(got - want) <= 1e-4 * all + 1e-30, "%s: row %d: %g, not %g", v.name.c_str(), r, got, want);
  }
}

// The rule: 16 scales are the larger of (largest magnitude) / 8 and (largest of the other sign) 16 / 119, in fp16, negative if
// the element of largest magnitude is positive; codes are the nearest ones.
Codes rounded_codes(int rows, int cols, const std::vector<float>& w) {
  Codes c{rows, cols, std::vector<int>((size_t)(rows * cols), 0), {}};
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < c.groups(); ++g) {
      float above = 0, below = 0;
      const int end = std::min(cols, 32 * g + 32);
      bool finite = true;
      for (int k = 32 * g; k < end; ++k) {
        const float e = w[(size_t)(r * cols + k)];
        finite = finite && std::isfinite(e);
        above = std::fmax(above, e), below = std::fmax(below, -e);
      }
      const float step = std::fmax(std::fmax(above, below) / 8, std::fmin(above, below) * 16 / 119);
      uint16_t half = to_half(below < above ? -step : step);
      if ((half & 0x7fff) == 0) half = 0;
      if (!finite || (half & 0x7c00) == 0x7c00) half = 0x7e00;
      c.steps.push_back(half);
      if (half == 0 || half == 0x7e00) continue;
      const float inverse = 1 / (half_to_float(half) / 16);
      for (int k = 32 * g; k < end; ++k)
        c.q[(size_t)(r * cols + k)] =
            (int)std::fmin(std::fmax(std::nearbyint(w[(size_t)(r * cols + k)] * inverse), -128.0f), 119.0f);
    }
  return c;
}

void packing(const Variant& v, int rows, int cols, Random& random) {
  std::vector<float> w((size_t)(rows * cols));
  for (float& e : w) e = random.normal() * std::ldexp(1.0f, random.below(4) - 6);
  if (random.below(3) == 0)
    for (float& e : w) e = (float)(random.below(3) - 1) * 0.5f;  // both signs are equally large
  const float odd[] = {NAN, INFINITY, 1e9f, 0.0f, 1e-9f};
  if (random.below(2)) w[(size_t)random.below(rows * cols)] = odd[random.below(5)];
  if (random.below(4) == 0)
    for (float& e : w) e *= 1e-7f;  // scales below fp16's normal numbers
  const std::vector<uint8_t> want = nested(rounded_codes(rows, cols, w));
  for (int format : {DSO_INT8_NESTED, DSO_INT4_NESTED}) {
    Buffer got(want.size());
    for (int tile = 0; tile < (rows + 15) / 16; ++tile)
      v.kernels->pack_tile(format, DSO_SRC_F32, w.data(), rows, cols, 4 * cols, nullptr, tile, got.get());
    for (size_t i = 0; i < want.size(); ++i)
      if (!check(got[i] == want[i], "%s: format %d, %d x %d: byte %zu is %02x, not %02x", v.name.c_str(), format, rows, cols, i,
                 got[i], want[i]))
        return;
  }
}
}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  for (const Variant& v : all) {
    Random random(17);
    in_double(v, random);
    for (int i = 0; i < rounds(120); ++i) {
      const int rows = 1 + random.below(70), cols = 1 + random.below(i % 10 ? 140 : 900);
      products(v, rows, cols, 1 + random.below(i % 8 ? 9 : 40), random);
      packing(v, rows, cols, random);
    }
  }
  return report("test_nested");
}
