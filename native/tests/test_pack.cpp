// Packing on every variant: the exact bytes of the rule (pack_rule.hpp); unpacked values within each format's bound; nothing is
// written outside a tile row's place or read outside the source.
#include <algorithm>

#include "pack_rule.hpp"

namespace {
constexpr int formats[] = {DSO_F32, DSO_BF16, DSO_INT8, DSO_INT4, DSO_Q4_1, DSO_FP8};
constexpr int sources[] = {DSO_SRC_F32, DSO_SRC_BF16, DSO_SRC_F16};
constexpr const char* source_names[] = {"f32", "bf16", "f16"};

// ---- checks
void compare(const Variant& v, int format, const Source& s, const std::vector<uint8_t>& want, Random& random) {
  const int tiles = (s.rows + band_rows(format) - 1) / band_rows(format);  // or, for FP8, bands of them
  const size_t tile_row = want.size() / (size_t)((s.rows + 15) / 16) * (size_t)band_rows(format) / 16;
  Buffer source(s.bytes.size()), packed(want.size());
  memcpy(source.get(), s.bytes.data(), s.bytes.size());
  const int one = random.below(tiles);  // first a single tile row: the others must not be touched
  auto pack = [&](int tile) {
    v.kernels->pack_tile(format, s.type, source.get(), s.rows, s.cols, s.stride(), s.weights(0), tile, packed.get());
  };
  pack(one);
  for (size_t i = 0; i < want.size(); ++i) {
    const uint8_t expected = i / tile_row == (size_t)one ? want[i] : 0xa5;
    if (!check(packed[i] == expected, "%s %s from %s [%d x %d] tile row %d, byte %zu of %zu: %02x, not %02x", v.name.c_str(),
               format_name(format), source_names[s.type], s.rows, s.cols, one, i % tile_bytes(format), i, packed[i], expected))
      return;
  }
  for (int tile = tiles - 1; tile >= 0; --tile) pack(tile);
  if (!check(memcmp(packed.get(), want.data(), want.size()) == 0, "%s %s from %s [%d x %d]: bytes differ", v.name.c_str(),
             format_name(format), source_names[s.type], s.rows, s.cols))
    return;

  const Matrix w = {format, s.rows, s.cols, packed.get()};
  const int begin = random.below(s.rows), end = begin + 1 + random.below(s.rows - begin), gap = random.below(3);
  const int64_t stride = 4 * (s.cols + gap);
  Buffer out((size_t)((end - begin - 1) * stride + 4 * s.cols)), row(4 * (size_t)s.cols);
  v.kernels->unpack_rows(w, begin, end, (float*)out.get(), stride);
  for (int r = begin; r < end; ++r) {
    v.kernels->embed_row(w, r, 3.0f, (float*)row.get());
    for (int c = 0; c < s.cols + gap; ++c) {
      const size_t at = (size_t)((r - begin) * stride + 4 * c);
      if (at + 4 > out.size()) break;
      float got, embedded;
      memcpy(&got, out.get() + at, 4);
      if (c >= s.cols) {
        check(to_bits(got) == 0xa5a5a5a5, "%s %s: unpack_rows wrote between rows", v.name.c_str(), format_name(format));
        continue;
      }
      memcpy(&embedded, row.get() + 4 * c, 4);
      const float expected = decoded(format, want, r, c, s.cols);
      if (!check(same(got, expected), "%s %s [%d x %d] (%d, %d): unpacked %g, not %g", v.name.c_str(), format_name(format),
                 s.rows, s.cols, r, c, got, expected))
        return;
      if (!check(same(embedded, expected * 3.0f), "%s %s (%d, %d): embedded %g, not 3 x %g", v.name.c_str(),
                 format_name(format), r, c, embedded, expected))
        return;
    }
  }
}

void bounded(int format, const Source& s, const std::vector<uint8_t>& packed) {
  Fp8Scales scales(s);
  for (int r = 0; r < s.rows; ++r)
    for (int c = 0; c < s.cols; ++c) {
      const int g = c / 32 * 32, n = std::min(32, s.cols - g);
      const double error = std::fabs((double)decoded(format, packed, r, c, s.cols) - s.at(r, c)),
                   limit = format == DSO_FP8
                               ? std::fmax(std::fabs(s.at(r, c)) / 16, scales.at(r, c) / 1024) * (1 + 1e-6) + 1e-43
                               : bound(format, &s.values[(size_t)(r * s.cols + g)], n, c - g, !s.importance.empty());
      if (!check(error <= limit, "%s (%d, %d): %g comes back with error %g, over %g", format_name(format), r, c, s.at(r, c),
                 error, limit))
        return;
    }
}

// No group's weighted error exceeds that of ggml's own scale (and minimum), up to rounding of the sums.
void no_worse_than_ggml(int format, const Source& s, const std::vector<uint8_t>& packed) {
  if (format != DSO_INT4 && format != DSO_Q4_1) return;
  for (int r = 0; r < s.rows; ++r)
    for (int g = 0; g < s.cols; g += 32) {
      const int n = std::min(32, s.cols - g);
      const float* w = &s.values[(size_t)(r * s.cols + g)];
      const float low = *std::min_element(w, w + n), high = *std::max_element(w, w + n);
      const float largest = *std::max_element(w, w + n, [](float a, float b) { return std::fabs(a) < std::fabs(b); });
      const float scale = rounded(format == DSO_INT4 ? largest / -8 : (high - low) / 15),
                  min = format == DSO_INT4 ? 0 : rounded(low);
      double ours = 0, theirs = 0;
      for (int i = 0; i < n; ++i) {
        const double weight = s.importance.empty() ? std::fabs(w[i]) : s.importance[(size_t)(g + i)];
        const double code = scale == 0 ? 0
                                       : std::fmin(std::fmax(std::nearbyint((w[i] - min) / scale), format == DSO_INT4 ? -8 : 0),
                                                   format == DSO_INT4 ? 7 : 15);
        ours += weight * std::pow(decoded(format, packed, r, g + i, s.cols) - w[i], 2),
            theirs += weight * std::pow(code * scale + min - w[i], 2);
      }
      if (!check(ours <= theirs * (1 + 1e-4), "%s row %d group %d: weighted error %g, ggml's is %g", format_name(format), r,
                 g / 32, ours, theirs))
        return;
    }
}

// Column weights over several magnitudes, some of them zero.
std::vector<float> importance_of(int cols, Random& random) {
  std::vector<float> found;
  for (int c = 0; c < cols; ++c) found.push_back(random.below(8) ? std::ldexp(random.uniform(), random.below(12) - 6) : 0);
  return found;
}

void shapes(const std::vector<Variant>& all) {
  Random random(1);
  const int dims[] = {1, 15, 16, 17, 31, 32, 33, 61, 100};
  for (int rows : dims)
    for (int cols : dims) {
      std::vector<float> wanted((size_t)(rows * cols));
      const float level = std::ldexp(1.0f, random.below(12) - 8), shift = random.below(2) ? 0 : random.normal() * level;
      for (float& x : wanted) x = random.normal() * level + shift;
      for (int type : sources) {
        Source s = make(type, rows, cols, random.below(3), wanted);
        if (random.below(2)) s.importance = importance_of(cols, random);
        for (int format : formats) {
          const std::vector<uint8_t> want = reference(format, s);
          bounded(format, s, want);
          no_worse_than_ggml(format, s, want);
          for (const Variant& v : all) compare(v, format, s, want, random);
        }
      }
    }
}

// Groups with corner cases of the rule, among ordinary ones.
void corners(const std::vector<Variant>& all) {
  Random random(2);
  for (int round = 0; round < rounds(60); ++round) {
    const int rows = 33, cols = round % 2 ? 150 : 96;
    std::vector<float> wanted((size_t)(rows * cols));
    for (int r = 0; r < rows; ++r)
      for (int g = 0; g < cols; g += 32) {
        float* w = &wanted[(size_t)(r * cols + g)];
        const int n = std::min(32, cols - g), kind = random.below(14);
        for (int i = 0; i < n; ++i) w[i] = random.normal();
        auto fill = [&](auto value) {
          for (int i = 0; i < n; ++i) w[i] = value();
        };
        switch (kind) {
          case 0:
            fill([] { return 0.0f; });
            break;
          case 1:
            fill([&] { return random.below(2) ? 0.0f : -0.0f; });
            break;
          case 2:
            fill([] { return -1.25f; });
            break;  // no range
          case 3:
            w[random.below(n)] = 5, w[random.below(n)] = -5;
            break;  // equal magnitudes
          case 4:
            fill([&] { return random.below(2) ? 2.0f : -2.0f; });
            break;
          case 5:
            fill([&] { return random.normal() * 1e-7f; });
            break;  // scales are fp16 subnormals
          case 6:
            fill([&] { return random.normal() * 1e-8f; });
            break;  // or zero
          case 7:
            fill([&] { return random.normal() * 1e-39f; });
            break;  // fp32 subnormals
          case 8:
            w[random.below(n)] = 9e6f * random.normal();
            break;  // scales overflow fp16
          case 9:
            fill([&] { return random.normal() * 3e4f; });
            break;  // near the end of fp16
          case 10:
            w[random.below(n)] = NAN;
            break;
          case 11:
            w[random.below(n)] = random.below(2) ? INFINITY : -INFINITY;
            break;
          case 12:
            fill([&] { return (float)(random.below(31) - 15) * 0.5f; });
            w[0] = -8;
            break;  // quotients at .5
          default:
            break;
        }
      }
    for (int type : sources) {
      Source s = make(type, rows, cols, 1, wanted);
      if (round % 4 > 1) s.importance = importance_of(cols, random);
      for (int format : formats) {
        const std::vector<uint8_t> want = reference(format, s);
        for (const Variant& v : all) compare(v, format, s, want, random);
      }
    }
  }
}

// Values unpacked from a Q4_0 block, or from this format, get the same scale and codes again.
void again(const std::vector<Variant>& all) {
  Random random(3);
  std::vector<float> wanted;
  for (int g = 0; g < 64; ++g) {
    const float scale = rounded((random.below(2) ? 0.01f : -0.01f) * (0.5f + random.uniform()));
    for (int i = 0; i < 32; ++i) wanted.push_back(scale * (float)(i == 5 ? -8 : random.below(16) - 8));
  }
  const Source s = make(DSO_SRC_F32, 16, 128, 0, wanted);
  for (const Variant& v : all) {
    Buffer packed(packed_bytes(DSO_INT4, 16, 128));
    v.kernels->pack_tile(DSO_INT4, DSO_SRC_F32, s.bytes.data(), 16, 128, s.stride(), nullptr, 0, packed.get());
    std::vector<float> back(16 * 128);
    v.kernels->unpack_rows({DSO_INT4, 16, 128, packed.get()}, 0, 16, back.data(), 4 * 128);
    for (size_t i = 0; i < back.size(); ++i)
      if (!check(back[i] == wanted[i], "%s: %g came back as %g", v.name.c_str(), wanted[i], back[i])) break;
  }
}
// FP8: several blocks, some of them invalid; and every value halfway between two codes, and its neighbors.
void e4m3(const std::vector<Variant>& all) {
  Random random(4);
  for (int round = 0; round < 8; ++round) {
    const int rows = 100 + random.below(200), cols = 1 + random.below(400);
    std::vector<float> wanted;
    for (int i = 0; i < rows * cols; ++i)
      wanted.push_back(random.below(8) ? std::ldexp(random.normal(), -random.below(20)) : 0);
    if (round % 2) wanted[(size_t)random.below(rows * cols)] = random.below(2) ? NAN : -INFINITY;
    if (round == 4) std::fill_n(wanted.begin(), 128 * cols, 1e-44f);  // a scale of zero
    for (int type : sources) {
      const Source s = make(type, rows, cols, random.below(3), wanted);
      const std::vector<uint8_t> want = reference(DSO_FP8, s);
      if (round % 2 == 0) bounded(DSO_FP8, s, want);
      for (const Variant& v : all) compare(v, DSO_FP8, s, want, random);
    }
  }
  std::vector<float> halves;  // with 448 among them the scale is 1
  for (int code = 0; code < 0x7e; ++code) {
    const float middle = (e4m3_to_float((uint8_t)code) + e4m3_to_float((uint8_t)(code + 1))) / 2;
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 500.0f), e4m3_to_float((uint8_t)(code + 1))})
      halves.push_back(x), halves.push_back(-x);
  }
  const Source s = make(DSO_SRC_F32, 8, (int)halves.size() / 8, 0, halves);
  for (const Variant& v : all) compare(v, DSO_FP8, s, reference(DSO_FP8, s), random);
}
}  // namespace

int main() {
  for (int code = 0; code < 0x7f; ++code)
    check(to_e4m3(e4m3_to_float((uint8_t)code)) == code, "the test's own E4M3 is wrong at %02x", code);
  for (uint32_t h = 0; h < 0x7c00; ++h)
    check(to_half(half_to_float((uint16_t)h)) == h, "the test's own fp16 is wrong at %04x", h);
  const std::vector<Variant> all = variants();
  if (all.empty()) return report("test_pack");
  shapes(all);
  corners(all);
  again(all);
  e4m3(all);
  return report("test_pack");
}
