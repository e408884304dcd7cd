// Checks the blocks that BLOCK_CHOOSE and LATENT_CHOOSE chose against estimates in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

// Blocks [0, S) and [W, n) must be chosen, and no middle block whose estimate is exceeded by that of another by more than
// rounding allows. A group's `heads` queries of d elements are consecutive, as are the blocks' maxima and minima; `rounding`:
// relative error of an estimate.
inline bool best_are_chosen(const std::vector<char>& chosen, int64_t S, int64_t W, const float* q, int64_t heads, int64_t d,
                            const float* largest, const float* smallest, double rounding) {
  const int64_t n = (int64_t)chosen.size();
  std::vector<double> score((size_t)n, -INFINITY), slack((size_t)n);
  for (int64_t h = 0; h < heads; ++h, q += d) {
    std::vector<double> e((size_t)n);
    double top = -INFINITY, off = 0;
    for (int64_t b = S; b < W; ++b) {
      double size = 0;
      for (int64_t i = 0; i < d; ++i) {
        const double high = largest[b * d + i], low = smallest[b * d + i];
        e[(size_t)b] += std::max(q[i] * high, q[i] * low);
        size += std::fabs(q[i]) * std::max(std::fabs(high), std::fabs(low));
      }
      top = std::max(top, e[(size_t)b]);
      off = std::max(off, size * rounding);
    }
    for (int64_t b = S; b < W; ++b) {
      score[(size_t)b] = std::max(score[(size_t)b], e[(size_t)b] - top);
      slack[(size_t)b] = std::max(slack[(size_t)b], 2 * off);
    }
  }
  double worst = INFINITY, best = -INFINITY;
  for (int64_t b = 0; b < n; ++b) {
    if (b < S || b >= W) {
      if (!chosen[(size_t)b]) return false;
    } else if (chosen[(size_t)b]) {
      worst = std::min(worst, score[(size_t)b] + slack[(size_t)b]);
    } else {
      best = std::max(best, score[(size_t)b] - slack[(size_t)b]);
    }
  }
  return worst >= best;
}
