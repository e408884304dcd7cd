// Packs and unpacks tiles of INT3. Defined in src/deepseek_optimizer/quant/trellis.py and int3.py, which this equals bit for
// bit.
#pragma once
#include <cstdint>
#include <cstring>

#include "../tile_bytes.hpp"
#include "pack_search.hpp"

namespace dso::DSO_ISA_NAMESPACE {
namespace packing {

constexpr int trellis_memory = 4, trellis_states = 1 << trellis_memory;
constexpr int trellis_steps[] = {0, -1, 1, -2, 2, -3, 3, -4};  // see STEPS in int3.py
constexpr int trellis_nan = 0xfc, trellis_infinite = 0xf8;
constexpr int trellis_quads[8] = {1, 3, 0, 2, 5, 7, 4, 6};
constexpr int trellis_column(int position) { return 4 * trellis_quads[position % 8] + position / 8; }
constexpr float trellis_value(int index) { return (float)trellis_values[index] - (float)code_offset(DSO_INT3); }

// 16 groups side by side, in the order of the path: y[position][row]; weights of the squared errors, of all rows.
struct Circle {
  alignas(64) float y[C][R];
  float weight[C];
  alignas(64) float cost[C][4][R];  // weighted squared distance to the closest value of each subset

  void measure() {
    for (int t = 0; t < C; t++) {
      const F x = load(y[t]), w = set(weight[t]);
      for (int subset = 0; subset < 4; subset++) {
        F best = zero();
        for (int u = 0; u < 4; u++) {
          const F d = sub(x, set(trellis_value(4 * u + subset))), square = mul(d, d);
          best = u ? min(best, square) : square;
        }
        store(cost[t][subset], mul(best, w));
      }
    }
  }
};

constexpr int trellis_lead = -trellis_shifts[0];  // bits of the path that the encoder is ahead of the values

constexpr int state_before(int state, int k) { return state >> 2 | k << (trellis_memory - 2); }
// The subsets of an even position and the next, on the way from a state to another, two bits of the path further.
constexpr int window_bit(int before, int state, int back) { return (before << 2 | (state & 3)) >> (back + trellis_lead) & 1; }
constexpr int even_subset(int before, int state) { return window_bit(before, state, 1) + 2 * window_bit(before, state, 0); }
constexpr int odd_subset(int before, int state) {
  int low = 0, high = 0;
  for (const int shift : trellis_shifts) low ^= window_bit(before, state, 1 + shift), high ^= window_bit(before, state, shift);
  return low + 2 * high;
}

// Two weights further along all paths. came: from which state before the best path to each state comes, bit by bit: of rows.
struct Came {
  uint16_t low, high;
};
template <bool trace>
DSO_INLINE void trellis_step(F (&total)[trellis_states], const float (&even)[4][R], const float (&odd)[4][R], Came* came) {
  F cost[4][4], next[trellis_states];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) cost[i][j] = add(load(even[i]), load(odd[j]));
#pragma GCC unroll 16
  for (int s = 0; s < trellis_states; s++) {
    uint32_t chosen[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const int before = state_before(s, k);
      const F error = add(total[before], cost[even_subset(before, s)][odd_subset(before, s)]);
      if constexpr (trace) chosen[k] = k ? ~at_least(error, next[s]) : 0;
      next[s] = k ? min(error, next[s]) : error;
    }
    if constexpr (trace) came[s] = {(uint16_t)(chosen[3] | (chosen[1] & ~chosen[2])), (uint16_t)(chosen[3] | chosen[2])};
  }
#pragma GCC unroll 16
  for (int s = 0; s < trellis_states; s++) total[s] = next[s];
}

static inline F least_error(const Circle& circle) {
  F total[trellis_states];
  for (F& x : total) x = zero();
  for (int t = 0; t < C; t += 2) trellis_step<false>(total, circle.cost[t], circle.cost[t + 1], nullptr);
  F best = total[0];
  for (int s = 1; s < trellis_states; s++) best = min(best, total[s]);
  return best;
}

static inline void best_start(const Circle& circle, int (&start)[R]) {
  alignas(64) float best[R] = {}, closed[R];
  for (int state = 0; state < trellis_states; state++) {
    F total[trellis_states];
    for (int s = 0; s < trellis_states; s++) total[s] = set(s == state ? 0.0f : __builtin_inff());
    for (int t = 0; t < C; t += 2) trellis_step<false>(total, circle.cost[t], circle.cost[t + 1], nullptr);
    store(closed, total[state]);
    for (int r = 0; r < R; r++)
      if (state == 0 || closed[r] < best[r]) best[r] = closed[r], start[r] = state;
  }
}

// path[r]: the best path from the state start[r] back to it.
static inline void trace(const Circle& circle, const int (&start)[R], uint32_t (&path)[R]) {
  Came came[C / 2][trellis_states];
  F total[trellis_states];
  alignas(64) float first[R];
  for (int s = 0; s < trellis_states; s++) {
    for (int r = 0; r < R; r++) first[r] = start[r] == s ? 0.0f : __builtin_inff();
    total[s] = load(first);
  }
  for (int t = 0; t < C; t += 2) trellis_step<true>(total, circle.cost[t], circle.cost[t + 1], came[t / 2]);
  for (int r = 0; r < R; r++) {
    int state = start[r];
    uint32_t bits = 0;
    for (int t = C - 2; t >= 0; t -= 2) {
      bits |= (uint32_t)(state >> 1 & 1) << t | (uint32_t)(state & 1) << (t + 1);
      const Came step = came[t / 2][state];
      state = state_before(state, (step.low >> r & 1) + 2 * (step.high >> r & 1));
    }
    path[r] = trellis_lead ? bits << trellis_lead | bits >> (32 - trellis_lead) : bits;
  }
}

static inline int subset_at(uint32_t path, int t) {
  const auto bit = [&](int at) { return (int)(path >> (at & 31) & 1); };
  if (t % 2 == 0) return bit(t) + 2 * bit(t + 1);
  int low = 0, high = 0;
  for (const int shift : trellis_shifts) low ^= bit(t - 1 - shift), high ^= bit(t - shift);
  return low + 2 * high;
}

static inline float scale_of_byte(int byte) { return from_f16((uint16_t)(byte << 7)); }

// A tile: 16 groups side by side, x[column][row], of which n columns exist. Overwrites rows without a usable scale.
static inline void pack_trellis(float (*x)[R], int n, const float* importance, uint8_t* dst) {
  alignas(64) float bad[R], scale[R], error[R], best[R] = {};
  alignas(32) uint16_t first16[R];
  F largest = zero(), nan = zero();
  for (int k = 0; k < n; k++) {
    const F column = load(x[k]);
    largest = max(largest, abs(column)), nan = fma(column, zero(), nan);  // NaN and infinity times zero are NaN
  }
  store(bad, nan);
  store(scale, div(largest, set(trellis_value(15))));
  to_f16(scale, first16);
  int first[R], chosen[R] = {};
  bool blank[R];
  for (int r = 0; r < R; r++) {
    first[r] = (first16[r] + 64) >> 7;
    if (bad[r] != bad[r] || first[r] >= trellis_infinite) first[r] = trellis_nan;
    blank[r] = first[r] == 0 || first[r] == trellis_nan;
    for (int k = 0; blank[r] && k < C; k++) x[k][r] = 0;
  }
  Circle circle;
  for (int t = 0; t < C; t++) {
    const int k = trellis_column(t);
    circle.weight[t] = k >= n ? 0 : importance ? importance[k] : 1;
  }
  const auto divide_by = [&](const F inverse) {
    for (int t = 0; t < C; t++) store(circle.y[t], mul(load(x[trellis_column(t)]), inverse));
    circle.measure();
  };
  for (const int step : trellis_steps) {
    int byte[R];
    for (int r = 0; r < R; r++) {
      byte[r] = first[r] + step;
      byte[r] = byte[r] < 1 ? 1 : byte[r] >= trellis_infinite ? trellis_infinite - 1 : byte[r];
      scale[r] = scale_of_byte(byte[r]);
    }
    const F s = load(scale);
    divide_by(div(set(1), s));
    store(error, mul(least_error(circle), mul(s, s)));
    for (int r = 0; r < R; r++)
      if (step == trellis_steps[0] || error[r] < best[r]) best[r] = error[r], chosen[r] = byte[r];
  }
  for (int r = 0; r < R; r++) scale[r] = scale_of_byte(blank[r] ? 1 : chosen[r]);
  divide_by(div(set(1), load(scale)));
  int start[R] = {};
  uint32_t path[R];
  best_start(circle, start);
  trace(circle, start, path);
  memset(dst, 0, 128);
  for (int r = 0; r < R; r++) {
    dst[192 + r] = (uint8_t)(blank[r] ? first[r] : chosen[r]);
    if (blank[r]) path[r] = 0;
    memcpy(dst + 128 + 4 * r, &path[r], 4);
    for (int t = 0; t < C && !blank[r]; t++) {
      const int column = trellis_column(t), quad = column / 4, subset = subset_at(path[r], t);
      int u = 0;
      for (int i = 0; i < 3; i++) u += circle.y[t][r] > (trellis_value(4 * i + subset) + trellis_value(4 * i + 4 + subset)) / 2;
      dst[64 * (quad / 4) + 4 * r + column % 4] |= (uint8_t)(u << 2 * (quad % 4));
    }
  }
}

// The 32 columns of row r of a tile.
static inline void unpack_trellis(const uint8_t* tile, int r, float* out) {
  uint32_t path;
  memcpy(&path, tile + 128 + 4 * r, 4);
  const float scale = scale_of_byte(tile[192 + r]);
  for (int t = 0; t < C; t++) {
    const int column = trellis_column(t), quad = column / 4;
    const int u = tile[64 * (quad / 4) + 4 * r + column % 4] >> 2 * (quad % 4) & 3;
    out[column] = trellis_value(4 * u + subset_at(path, t)) * scale;
  }
}

}  // namespace packing
}  // namespace dso::DSO_ISA_NAMESPACE
