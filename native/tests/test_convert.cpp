// Activation conversion against scalar code, bit for bit, on every variant: odd widths, ranges, extreme and non-finite values.
#include "check.hpp"

namespace {
std::vector<uint8_t> reference(int kind, const std::vector<float>& x) {
  const int64_t width = (int64_t)x.size(), wp = (width + 31) / 32 * 32;
  std::vector<uint8_t> row(row_bytes(kind, width), 0);
  std::vector<float> padded(x);
  padded.resize((size_t)wp, 0.0f);
  if (kind == DSO_SLOT_BF16) {
    for (int64_t i = 0; i < wp; ++i) {
      const uint32_t u = to_bits(padded[i]);
      const uint16_t b = std::isnan(padded[i]) ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
      memcpy(&row[2 * i], &b, 2);
    }
    return row;
  }
  const bool wide = kind == DSO_SLOT_Q16;
  const float steps = wide ? 32512.0f : 127.0f;
  uint8_t *scales = &row[(wide ? 2 : 1) * wp], *sums = scales + wp / 8;
  for (int64_t g = 0; g < wp / 32; ++g) {
    float top = 0;
    bool finite = true;
    for (int i = 0; i < 32; ++i) {
      finite = finite && std::isfinite(padded[32 * g + i]);
      top = std::fmax(top, std::fabs(padded[32 * g + i]));
    }
    const float inverse = steps / top;
    const bool zero = !std::isfinite(inverse);
    float scale = !finite ? NAN : zero ? 0.0f : top / steps;
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
      const int q = !finite || zero ? 0 : (int)std::nearbyint(padded[32 * g + i] * inverse);
      check(std::abs(q) <= (int)steps, "reference code %d out of range", q);
      sum += q;
      const int hi = wide ? (q + 128) >> 8 : q;
      row[32 * g + i] = (uint8_t)(int8_t)hi;
      if (wide) row[wp + 32 * g + i] = (uint8_t)(int8_t)(q - 256 * hi);
    }
    memcpy(scales + 4 * g, &scale, 4);
    memcpy(sums + 4 * g, &sum, 4);
  }
  return row;
}

void compare(const Variant& v, int kind, const std::vector<float>& x, int64_t split, const char* what) {
  const int64_t width = (int64_t)x.size(), wp = (width + 31) / 32 * 32;
  const std::vector<uint8_t> want = reference(kind, x);
  Buffer got(row_bytes(kind, width), 0);
  if (split > 0 && split < width) {  // in two calls, the later part first
    v.kernels->convert(kind, x.data() + split, split, width, width, got.get());
    v.kernels->convert(kind, x.data(), 0, split, width, got.get());
  } else {
    v.kernels->convert(kind, x.data(), 0, width, width, got.get());
  }
  const int64_t scales = kind == DSO_SLOT_BF16 ? (int64_t)want.size() : wp * (kind == DSO_SLOT_Q16 ? 2 : 1);
  for (int64_t i = 0; i < (int64_t)want.size(); ++i) {
    if (i >= scales && i < scales + wp / 8) {
      float a, b;
      const int64_t at = i - (i - scales) % 4;
      memcpy(&a, got.get() + at, 4);
      memcpy(&b, &want[at], 4);
      if (!check(same(a, b), "%s %s kind %d width %ld: scale %ld is %g, not %g", v.name.c_str(), what, kind, (long)width,
                 (long)(at - scales) / 4, a, b))
        return;
    } else if (!check(got[i] == want[i], "%s %s kind %d width %ld: byte %ld is %d, not %d", v.name.c_str(), what, kind,
                      (long)width, (long)i, got[i], want[i])) {
      return;
    }
  }
}
}  // namespace

int main() {
  for (const Variant& v : vector_variants())
    for (int kind : {DSO_SLOT_BF16, DSO_SLOT_Q8, DSO_SLOT_Q16}) {
      Random random(7);
      for (int width : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 576, 1009}) {
        std::vector<float> x((size_t)width);
        for (int repeat = 0; repeat < rounds(20); ++repeat) {
          const float magnitude = std::ldexp(1.0f, random.below(200) - 100);
          for (float& e : x) e = random.normal() * magnitude;
          compare(v, kind, x, 32 * random.below(width / 32 + 1), "random");
        }
        for (float special : {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-36f, 1e-39f, 1.4e-45f, -0.0f})
          for (int i = 0; i < width; i += width > 100 ? 37 : 1) {
            for (float& e : x) e = random.normal();
            x[(size_t)i] = special;
            compare(v, kind, x, 0, "special");
            for (float& e : x) e = 0;
            x[(size_t)i] = special;
            compare(v, kind, x, 0, "special among zeros");
          }
        for (float& e : x) e = (float)(random.below(65025) - 32512) * 0.5f;  // ties in both kinds
        x[0] = 32512 * 0.5f;
        compare(v, kind, x, 0, "ties");
        for (float& e : x) e = random.below(2) ? 1.0f : -1.0f;  // the largest codes
        compare(v, kind, x, 0, "signs");
        for (uint32_t u = 0; u < (uint32_t)rounds(64); ++u) {  // any bit pattern
          for (float& e : x) e = from_bits(random.bits());
          compare(v, kind, x, 0, "bits");
        }
      }
    }
  return report("test_convert");
}
