// INT4 rows of a cache in plain scalar code: the Hadamard transform, and the row that the cache stores for a given one. An
// independent implementation of kernels/generic/kv_int4.hpp; sums have the order that the kernels promise.
#pragma once
#include "check.hpp"

template <class Real>
void hadamard(Real* x, int64_t d, bool inverse) {
  for (int64_t n; d > 0; x += n, d -= n) {
    for (n = 1; 2 * n <= d;) n *= 2;
    for (int64_t h = n / 2; h >= 1; h /= 2)
      for (int64_t i = 0; i < n; ++i) {
        if (i & h) continue;
        const Real a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    if (inverse)
      for (int64_t i = 0; i < n; ++i) x[i] /= (Real)n;
  }
}

// 16 sums, each over every sixteenth element, added in a tree.
struct LaneSum {
  float lane[16] = {};
  void add(int64_t i, float x) { lane[i % 16] = lane[i % 16] + x; }
  float total() {
    for (int half = 8; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
    return lane[0];
  }
};

inline float nearest_int4(float x) {
  static const float values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  int code = 0;
  while (code < 15 && x > (values[code] + values[code + 1]) * 0.5f) ++code;
  return values[code];
}

struct Int4Row {
  std::vector<float> codes;  // transformed values in units of the scale
  float scale;
};

inline Int4Row int4_row(const float* x, int64_t d) {
  std::vector<float> y(x, x + d);
  hadamard(y.data(), d, false);
  float up = 0, down = 0;
  for (float v : y) {
    up = std::fmax(up, v);
    down = std::fmax(down, -v);
  }
  struct Try {
    float scale, error, better;
  };
  auto attempt = [&](float scale) {
    LaneSum error, xc, cc;
    for (int64_t i = 0; i < d; ++i) {
      const float c = nearest_int4(y[(size_t)i] * (1.0f / scale)), e = c * scale - y[(size_t)i];
      error.add(i, e * e);
      xc.add(i, y[(size_t)i] * c);
      cc.add(i, c * c);
    }
    return Try{scale, error.total(), xc.total() / cc.total()};
  };
  const float top = up >= down ? up : -down;
  Try best = attempt(top / -127.0f);
  const Try smaller = attempt(top / -145.0f);
  if (smaller.error < best.error) best = smaller;
  const Try fitted = attempt(best.better);
  if (fitted.error < best.error) best = fitted;
  Int4Row row = {{}, best.scale};
  for (float v : y) row.codes.push_back(nearest_int4(v * (1.0f / best.scale)));
  return row;
}

// What is read for a row that was written.
inline std::vector<float> int4_stored(const float* x, int64_t d) {
  const Int4Row row = int4_row(x, d);
  std::vector<float> out;
  for (float c : row.codes) out.push_back(c * row.scale);
  hadamard(out.data(), d, true);
  return out;
}
