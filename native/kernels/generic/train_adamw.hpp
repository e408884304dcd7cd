// AdamW on one tensor (Loshchilov and Hutter 2019) in one pass, and the squares of its gradient. The arithmetic is that of
// train/ops/adamw.py, operation by operation and without fused products, with bitwise equal results.
#pragma once

namespace dso::DSO_ISA_NAMESPACE {

struct Moments {
  F m, v;
};

// ---- master weights: the fp32 weights and how they are stored
template <int master>
DSO_INLINE F load_weights(const dso_train_update& u, int64_t i, int64_t n) {
  if constexpr (master == DSO_MASTER_NONE) {
    return load_some((const float*)u.parameter + i, n);
  } else if constexpr (master == DSO_MASTER_STOCHASTIC) {
    return load_some((const uint16_t*)u.parameter + i, n);
  } else {
    const F upper = load_some((const uint16_t*)u.parameter + i, n);
    uint16_t few[16] = {};
    const uint16_t* low = (const uint16_t*)u.low + i;
    if (n < 16) low = (const uint16_t*)memcpy(few, low, (size_t)fewer<uint16_t>(n));
    return from_bits(iadd(bits(upper), load_i16(low)));
  }
}

template <int master>
DSO_INLINE void store_weights(const dso_train_update& u, int64_t i, int64_t n, F x, uint32_t key, uint32_t second) {
  if constexpr (master == DSO_MASTER_NONE) {
    store_some((float*)u.parameter + i, x, n);
  } else if constexpr (master == DSO_MASTER_STOCHASTIC) {
    store_upper((uint16_t*)u.parameter + i, round_by_chance(x, iand(random_bits(i, key, second), iset(0xffff))), n);
  } else {  // the nearest bf16, ties away from zero; the difference of the bits fits into 16 bits with a sign
    const I all = bits(where_nan(x, set(__builtin_nanf("")), x));
    const I upper = iand(iadd(all, iset(0x8000)), iset((int32_t)0xffff0000));
    store_upper((uint16_t*)u.parameter + i, from_bits(upper), n);
    uint16_t few[16], *low = (uint16_t*)u.low + i;
    store_16(n < 16 ? few : low, isub(all, upper));
    if (n < 16) memcpy(low, few, (size_t)fewer<uint16_t>(n));
  }
}

// ---- 8-bit moments in blocks of 256, after FlashOptim (arXiv 2602.23349): m by softsign, v by its root
constexpr int64_t block = 256;
struct Block {
  alignas(64) float m[block], root[block];
};

DSO_INLINE I load_codes(const void* p, int64_t i, int64_t n, bool is_signed) {
  const uint8_t* codes = (const uint8_t*)p + i;
  uint8_t few[16] = {};
  if (n < 16) codes = (const uint8_t*)memcpy(few, codes, (size_t)fewer<uint8_t>(n));
  return is_signed ? load_i8(codes) : load_u8(codes);
}
DSO_INLINE void store_codes(void* p, int64_t i, int64_t n, I codes, bool is_signed) {
  uint8_t few[16], *to = n < 16 ? few : (uint8_t*)p + i;
  is_signed ? store_i8(to, codes) : store_u8(to, codes);
  if (n < 16) memcpy((uint8_t*)p + i, few, (size_t)fewer<uint8_t>(n));
}
DSO_INLINE float inverse_of(float scale) {  // 0 if it overflows: such a block counts as zeros
  const float inverse = 1.0f / scale;
  return inverse <= 3.4028234664e38f ? inverse : 0.0f;
}

DSO_INLINE Moments load_coded(const dso_train_update& u, int64_t i, int64_t n) {
  const F y = div(to_float(load_codes(u.m, i, n, true)), set(127.0f));
  const F root = mul(div(to_float(load_codes(u.v, i, n, false)), set(255.0f)), set(u.v_scale[i / block]));
  return {mul(div(y, sub(set(2.0f), abs(y))), set(u.m_scale[i / block])), mul(root, root)};
}

DSO_INLINE void store_block(const dso_train_update& u, int64_t begin, int64_t n, const Block& b) {
  F top_m = zero(), top_root = zero();
  for (int64_t i = 0; i < n; i += 16) {  // lanes past the end hold zeros
    top_m = max(abs(load(b.m + i)), top_m);
    top_root = max(load(b.root + i), top_root);
  }
  const float m_scale = largest(top_m), v_scale = largest(top_root);
  const F to_m = set(inverse_of(m_scale)), to_root = set(inverse_of(v_scale));
  u.m_scale[begin / block] = m_scale;
  u.v_scale[begin / block] = v_scale;
  for (int64_t i = 0; i < n; i += 16) {
    const F y = mul(load(b.m + i), to_m), soft = div(add(y, y), add(set(1.0f), abs(y)));
    store_codes(u.m, begin + i, n - i, to_int(mul(soft, set(127.0f))), true);
    const F root = load(b.root + i), code = round(mul(mul(root, to_root), set(255.0f)));
    // A nonzero root stays nonzero: dividing by it would otherwise overflow.
    store_codes(u.v, begin + i, n - i, to_int(less(zero(), root, max(code, set(1.0f)), code)), false);
  }
}

// ---- the update
template <class T, int master, int moments>
static void adamw_range(const dso_train_update& u, int64_t begin, int64_t end) {
  const F scale = set(u.gradient_scale), beta1 = set(u.beta1), rest1 = set(u.rest1), beta2 = set(u.beta2), rest2 = set(u.rest2);
  const F bias2 = set(u.bias2), eps = set(u.eps), decay = set(u.decay), step = set(u.step);
  Block coded;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t count = end - first < block ? end - first : block;
    for (int64_t j = 0; j < count; j += 16) {
      const int64_t i = first + j, n = count - j;
      Moments old;
      if constexpr (moments == DSO_MOMENTS_F32)
        old = {load_some((const float*)u.m + i, n), load_some((const float*)u.v + i, n)};
      if constexpr (moments == DSO_MOMENTS_BF16)
        old = {load_some((const uint16_t*)u.m + i, n), load_some((const uint16_t*)u.v + i, n)};
      if constexpr (moments == DSO_MOMENTS_INT8) old = load_coded(u, i, n);
      const F g = mul(load_some((const T*)u.gradient + i, n), scale);
      const F m = add(mul(beta1, old.m), mul(rest1, g)), v = add(mul(beta2, old.v), mul(mul(rest2, g), g));
      const F root = sqrt(v), p = load_weights<master>(u, i, n);
      const F change = add(mul(decay, p), div(mul(step, m), add(mul(root, bias2), eps)));
      store_weights<master>(u, i, n, sub(p, change), u.key[2], u.key[3]);
      if constexpr (moments == DSO_MOMENTS_F32) {
        store_some((float*)u.m + i, m, n);
        store_some((float*)u.v + i, v, n);
      } else if constexpr (moments == DSO_MOMENTS_BF16) {
        const I random = random_bits(i, u.key[0], u.key[1]);
        store_upper((uint16_t*)u.m + i, round_by_chance(m, iand(random, iset(0xffff))), n);
        store_upper((uint16_t*)u.v + i, round_by_chance(v, shr<16>(random)), n);
      } else {
        store(coded.m + j, keep(m, 0, n, zero()));
        store(coded.root + j, keep(root, 0, n, zero()));
      }
    }
    if constexpr (moments == DSO_MOMENTS_INT8) store_block(u, first, count, coded);
  }
}

template <class T, int master>
static void adamw_moments(const dso_train_update& u, int64_t begin, int64_t end) {
  switch (u.moments) {
    case DSO_MOMENTS_F32:
      return adamw_range<T, master, DSO_MOMENTS_F32>(u, begin, end);
    case DSO_MOMENTS_BF16:
      return adamw_range<T, master, DSO_MOMENTS_BF16>(u, begin, end);
    case DSO_MOMENTS_INT8:
      return adamw_range<T, master, DSO_MOMENTS_INT8>(u, begin, end);
  }
}
template <class T>
static void adamw_masters(const dso_train_update& u, int64_t begin, int64_t end) {
  switch (u.master) {
    case DSO_MASTER_NONE:
      return adamw_moments<T, DSO_MASTER_NONE>(u, begin, end);
    case DSO_MASTER_SPLIT:
      return adamw_moments<T, DSO_MASTER_SPLIT>(u, begin, end);
    case DSO_MASTER_STOCHASTIC:
      return adamw_moments<T, DSO_MASTER_STOCHASTIC>(u, begin, end);
  }
}
static void adamw(const dso_train_update& u, int64_t begin, int64_t end) {
  if (u.gradient_type == DSO_TYPE_BF16)
    adamw_masters<uint16_t>(u, begin, end);
  else
    adamw_masters<float>(u, begin, end);
}

// ---- the sum of squares, in double and in a fixed order, and the number of non-finite elements
template <class T>
static void squares_of(const T* x, int64_t n, double* squares, int64_t* not_finite) {
  D sums[2] = {no_squares(), no_squares()};
  const F most = set(3.4028234664e38f);
  int64_t finite = 0;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int j = 0; j < 2; ++j) {
      const F v = load_some(x + i + 16 * j, 16);
      finite += __builtin_popcount(at_least(most, abs(v)));
      sums[j] = add_squares(sums[j], v);
    }
  for (; i < n; i += 16) {
    const F v = load_some(x + i, n - i);
    finite += __builtin_popcount(at_least(most, abs(v))) - (n - i < 16 ? 16 - (n - i) : 0);
    sums[0] = add_squares(sums[0], v);
  }
  double parts[32];
  store(parts, sums[0]);
  store(parts + 16, sums[1]);
  for (int width = 16; width >= 1; width /= 2)
    for (int k = 0; k < width; ++k) parts[k] += parts[k + width];
  *squares = parts[0];
  *not_finite = n - finite;
}
static void squares(int32_t type, const void* x, int64_t begin, int64_t end, double* sum, int64_t* not_finite) {
  if (type == DSO_TYPE_BF16)
    squares_of((const uint16_t*)x + begin, end - begin, sum, not_finite);
  else
    squares_of((const float*)x + begin, end - begin, sum, not_finite);
}

}  // namespace dso::DSO_ISA_NAMESPACE
