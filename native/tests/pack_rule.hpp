// The packing rule of docs/contracts.md in plain scalar code: sources, and the exact bytes and error bounds of each format.
#pragma once
#include <algorithm>
#include <utility>

#include "check.hpp"

// ---- scalar conversions
inline uint16_t to_half(float x) {  // nearest even
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (std::isnan(x)) return (uint16_t)(sign | 0x7e00);
  if (a >= 65520.0f) return (uint16_t)(sign | 0x7c00);
  const int exponent = a < std::ldexp(1.0f, -14) ? -14 : std::ilogb(a);
  const int units = (int)std::nearbyint(std::ldexp((double)a, 10 - exponent));  // of the last place; 2048 carries over
  return (uint16_t)(sign | (units + ((exponent + 14) << 10)));                  // the implicit bit makes a subnormal normal
}
inline uint16_t to_bfloat(float x) {
  const uint32_t u = to_bits(x);
  if (std::isnan(x)) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float rounded(float x) { return half_to_float(to_half(x)); }

// ---- sources
struct Source {
  int type, rows, cols, gap;           // gap: elements between rows
  std::vector<uint8_t> bytes;          // ends with the last row
  std::vector<float> values;           // [rows][cols], exact
  std::vector<float> importance = {};  // of the columns; empty: none is given

  int64_t size() const { return type == DSO_SRC_F32 ? 4 : 2; }
  int64_t stride() const { return (cols + gap) * size(); }
  const float* weights(int column) const { return importance.empty() ? nullptr : &importance[(size_t)column]; }
  float at(int r, int c) const { return values[(size_t)r * (size_t)cols + (size_t)c]; }
};

inline Source make(int type, int rows, int cols, int gap, const std::vector<float>& wanted) {
  Source s{type, rows, cols, gap, {}, {}, {}};
  s.bytes.assign((size_t)((rows - 1) * s.stride() + cols * s.size()), 0x7f);  // a gap of NaNs
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      const float x = wanted[(size_t)r * (size_t)cols + (size_t)c];
      uint8_t* to = &s.bytes[(size_t)(r * s.stride() + c * s.size())];
      const uint16_t h = type == DSO_SRC_BF16 ? to_bfloat(x) : to_half(x);
      if (type == DSO_SRC_F32)
        memcpy(to, &x, 4);
      else
        memcpy(to, &h, 2);
      s.values.push_back(type == DSO_SRC_F32 ? x : type == DSO_SRC_BF16 ? from_bits((uint32_t)h << 16) : half_to_float(h));
    }
  return s;
}

// ---- the rule, one group at a time
struct Group {
  uint16_t scale = 0, min = 0;
  int codes[32];  // as stored
};

// Results of a scale and a minimum for a group, in float32, with sums over columns in order.
struct Trial {
  int format, n;
  const float *w, *importance;
  float scale, min, error = 0, codes[32];

  Trial(int format, int n, const float* w, const float* importance, float scale, float min)
      : format(format), n(n), w(w), importance(importance), scale(scale), min(min) {
    const float least = format == DSO_INT4 ? -8.0f : 0.0f, most = format == DSO_INT4 ? 7.0f : 15.0f,
                inverse = scale != 0 ? 1 / scale : 0;
    for (int i = 0; i < n; ++i) {
      const float y = w[i] - min;
      codes[i] = std::fmin(std::fmax(std::nearbyint(y * inverse), least), most);
      const float d = y - codes[i] * scale;
      error += d * d * weight(i);
    }
  }
  float weight(int i) const { return importance ? importance[i] : std::fabs(w[i]); }

  Trial fitted() const {
    float sw = 0, sq = 0, sqq = 0, sy = 0, sqy = 0;
    for (int i = 0; i < n; ++i) {
      const float y = w[i] - min, wq = weight(i) * codes[i];
      sw += weight(i), sq += wq, sqq += wq * codes[i], sy += weight(i) * y, sqy += wq * y;
    }
    const float determinant = sw * sqq - sq * sq, step = std::fabs(scale);
    const float s = format == DSO_INT4 ? sqy / sqq : (sw * sqy - sq * sy) / determinant,
                m = format == DSO_INT4 ? 0 : (sqq * sy - sq * sqy) / determinant;
    const auto limited = [](float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; };  // NaN stays
    return {format, n, w, importance, rounded(scale + limited(s - scale, step / 16)), rounded(min + limited(m, step / 2))};
  }
};

inline Group group_of(int format, const float* w, int n, const float* importance) {
  Group out;
  const int zero = format == DSO_INT8 ? 128 : format == DSO_INT4 ? 8 : 0;
  for (int& code : out.codes) code = zero;
  float low = w[0], high = w[0], first = w[0];
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(w[i])) return out.scale = 0x7e00, out;
    low = std::fmin(low, w[i]), high = std::fmax(high, w[i]);
    if (std::fabs(w[i]) > std::fabs(first)) first = w[i];
  }
  const float most = std::fmax(std::fabs(low), std::fabs(high));
  float scale = rounded(format == DSO_INT8 ? most / 127.0f : format == DSO_INT4 ? first / -8.0f : (high - low) / 15.0f);
  float min = format == DSO_Q4_1 ? rounded(low) : 0.0f;
  if (!std::isfinite(scale) || !std::isfinite(min)) return out.scale = 0x7e00, out;
  out.min = min == 0 ? 0 : to_half(min);
  if (scale == 0) return out;
  if (format == DSO_INT8) {
    for (int i = 0; i < n; ++i) out.codes[i] = zero + (int)std::fmin(std::fmax(std::nearbyint(w[i] / scale), -127), 127);
    return out.scale = to_half(scale), out;
  }
  Trial best(format, n, w, importance, scale, min);
  const auto consider = [&](const Trial& other) {
    if (other.error < best.error) best = other;
  };
  const auto end = [&](float e) { consider({format, n, w, importance, rounded(first / e), 0}); };
  if (format == DSO_INT4 && importance)
    for (const float sign : {-1.0f, 1.0f})
      for (const float e : {6.5f, 7.0f, 7.5f, 8.0f, 8.5f, 9.0f, 9.5f}) end(sign * e);
  if (format == DSO_Q4_1)
    for (int below = 0; below < 4; ++below)
      for (int above = 0; above < 4; ++above) {
        const float from = low + (high - low) * (float)below / 32, to = high - (high - low) * (float)above / 32;
        consider({format, n, w, importance, rounded((to - from) / 15), rounded(from)});
      }
  consider(best.fitted());
  for (int i = 0; i < n; ++i) out.codes[i] = zero + (int)best.codes[i];
  out.min = best.min == 0 ? 0 : to_half(best.min);
  out.scale = best.scale == 0 ? 0 : to_half(best.scale);
  return out;
}

// The scales of the 128 x 128 blocks.
struct Fp8Scales {
  int across;
  std::vector<float> each;
  explicit Fp8Scales(const Source& s) : across((s.cols + 127) / 128), each((size_t)((s.rows + 127) / 128 * across), 0.0f) {
    for (int r = 0; r < s.rows; ++r)
      for (int c = 0; c < s.cols; ++c) {
        float& most = at(r, c);
        const float w = std::fabs(s.at(r, c));
        most = std::isnan(most) || !std::isfinite(w) ? NAN : std::fmax(most, w);
      }
    for (float& most : each) most /= 448.0f;
  }
  float& at(int r, int c) { return each[(size_t)(r / 128 * across + c / 128)]; }
};

inline std::vector<uint8_t> fp8_reference(const Source& s) {
  std::vector<uint8_t> packed(packed_bytes(DSO_FP8, s.rows, s.cols), 0);
  Fp8Scales scales(s);
  for (int r = 0; r < (s.rows + 15) / 16 * 16; ++r)
    for (int c = 0; c < (s.cols + 31) / 32 * 32; ++c) {
      int shift;
      const size_t at = code_at(DSO_FP8, r, c, s.cols, &shift);
      const float scale = scales.at(std::min(r, s.rows - 1), std::min(c, s.cols - 1));
      memcpy(&packed[at / 544 * 544 + 512], &scale, 4);
      if (r < s.rows && c < s.cols && scale > 0)
        packed[at] = to_e4m3(std::fmax(std::fmin(s.at(r, c) / scale, 448.0f), -448.0f));
    }
  return packed;
}

inline std::vector<uint8_t> reference(int format, const Source& s) {
  if (format == DSO_FP8) return fp8_reference(s);
  std::vector<uint8_t> packed(packed_bytes(format, s.rows, s.cols), 0);
  const int groups = (s.cols + 31) / 32;
  for (int r = 0; r < (s.rows + 15) / 16 * 16; ++r)
    for (int g = 0; g < groups; ++g) {
      uint8_t* tile = &packed[(size_t)(r / 16 * groups + g) * tile_bytes(format)];
      float w[32] = {};
      const int n = r >= s.rows ? 32 : std::min(32, s.cols - 32 * g);
      for (int i = 0; i < n && r < s.rows; ++i) w[i] = s.at(r, 32 * g + i);
      if (format == DSO_F32)
        for (int k = 0; k < 32; ++k) memcpy(tile + (k * 16 + r % 16) * 4, &w[k], 4);
      if (format == DSO_BF16)
        for (int k = 0; k < 32; ++k) {
          const uint16_t h = to_bfloat(w[k]);
          memcpy(tile + (k / 2 * 16 + r % 16) * 4 + k % 2 * 2, &h, 2);
        }
      if (format == DSO_F32 || format == DSO_BF16) continue;
      const Group group = group_of(format, w, n, s.weights(32 * g));
      for (int k = 0; k < 32; ++k) {
        int shift;
        const size_t at = code_at(format, r, 32 * g + k, s.cols, &shift);
        packed[at] = (uint8_t)(packed[at] | group.codes[k] << shift);
      }
      uint8_t* tail = tile + code_bytes(format) + r % 16 * 2;
      memcpy(tail, &group.scale, 2);
      if (format == DSO_Q4_1) memcpy(tail + 32, &group.min, 2);
    }
  return packed;
}

inline float decoded(int format, const std::vector<uint8_t>& packed, int r, int c, int cols) {
  const uint8_t* tile = &packed[(size_t)(r / 16 * ((cols + 31) / 32) + c / 32) * tile_bytes(format)];
  const int k = c % 32;
  if (format == DSO_F32) {
    float x;
    memcpy(&x, tile + (k * 16 + r % 16) * 4, 4);
    return x;
  }
  uint16_t h, m;
  if (format == DSO_BF16) {
    memcpy(&h, tile + (k / 2 * 16 + r % 16) * 4 + k % 2 * 2, 2);
    return from_bits((uint32_t)h << 16);
  }
  int shift;
  const uint8_t byte = packed[code_at(format, r, c, cols, &shift)];
  if (format == DSO_FP8) {
    float scale;
    memcpy(&scale, tile + 512, 4);
    return e4m3_to_float(byte) * scale;
  }
  const int code = format == DSO_INT8 ? byte - 128 : (byte >> shift & 15) - (format == DSO_INT4 ? 8 : 0);
  memcpy(&h, tile + code_bytes(format) + r % 16 * 2, 2);
  memcpy(&m, tile + code_bytes(format) + r % 16 * 2 + (format == DSO_Q4_1 ? 32 : 0), 2);
  const float w = half_to_float(h) * (float)code;
  return format == DSO_Q4_1 ? w + half_to_float(m) : w;
}

// Upper bound of |unpacked - w| for a group of n whose scale neither over- nor underflows fp16.
inline double bound(int format, const float* w, int n, int i, bool importance) {
  double low = w[0], high = w[0];
  for (int k = 0; k < n; ++k) low = std::fmin(low, w[k]), high = std::fmax(high, w[k]);
  const double most = std::fmax(std::fabs(low), std::fabs(high)), half = std::ldexp(1.0, -11), tiny = std::ldexp(1.0, -25);
  switch (format) {
    case DSO_F32:
      return 0;
    case DSO_BF16:
      return std::fabs(w[i]) / 256;
    case DSO_INT8:
      return most / 254 + 128 * (most / 127 * half + tiny);
    case DSO_INT4: {
      const double step = most / (importance ? 6.5 : 8) * 17 / 16, shortest = most / (importance ? 9.5 : 8) * 15 / 16;
      const bool far = !importance && high != -low && (w[i] > 0) == (high > -low);  // on the side that has 8 steps
      return std::fmax(step / 2, std::fabs(w[i]) - (far ? 8 : 7) * shortest) + 9 * (step * half + tiny);
    }
    default: {
      const double span = high - low, step = span / 15 * 17 / 16, trim = span * 3 / 32, from = low + trim + step / 2,
                   to = high - trim - span / 15 * 23 / 16;
      return std::fmax(step / 2, std::fmax(from - w[i], w[i] - to)) + 16 * (step * half + tiny) +
             2 * (std::fmax(std::fabs(low), std::fabs(from)) * half + tiny) + 1e-6 * most;
    }
  }
}
