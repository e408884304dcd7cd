// The checks of test_lanes.cpp, included once per ISA after its lanes and math.hpp. Everything is compared with scalar code;
// `bits` collects results that must also be bitwise equal on every ISA.
namespace dso::DSO_ISA_NAMESPACE {

struct Floats {
  alignas(64) float at[16];
};
DSO_INLINE Floats out(F x) {
  Floats f;
  store(f.at, x);
  return f;
}
struct Ints {
  alignas(64) int32_t at[16];
};
DSO_INLINE Ints out_int(I x) {
  Ints i;
  store_bytes(i.at, x);
  return i;
}

static void check_memory(const char* isa, Random& random) {
  float memory[48];
  for (int n = 0; n <= 17; ++n) {
    const int used = n < 16 ? n : 16;
    for (int i = 0; i < 48; ++i) memory[i] = (float)(i + 1);
    const Floats part = out(load(memory + 8, n));
    for (int i = 0; i < 16; ++i)
      check(part.at[i] == (i < used ? memory[8 + i] : 0.0f), "%s load of %d: lane %d is %g", isa, n, i, part.at[i]);
    store(memory + 8, set(-1.0f), n);
    for (int i = 0; i < 48; ++i)
      check(memory[i] == (i >= 8 && i < 8 + used ? -1.0f : (float)(i + 1)), "%s store of %d: element %d is %g", isa, n, i,
            memory[i]);
  }
  for (int repeat = 0; repeat < rounds(3000); ++repeat) {
    alignas(64) float x[16];
    for (float& e : x) e = repeat % 2 ? from_bits(random.bits()) : random.normal();
    uint16_t b[16], h[16];
    store_bf16(b, load(x));
    const Floats back = out(load_bf16(b));
    for (int i = 0; i < 16; ++i) {
      const uint32_t u = to_bits(x[i]);
      const uint16_t want = std::isnan(x[i]) ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
      check(b[i] == want, "%s store_bf16(%08x) is %04x, not %04x", isa, u, b[i], want);
      check(same(back.at[i], from_bits((uint32_t)b[i] << 16)), "%s load_bf16(%04x)", isa, b[i]);
      h[i] = (uint16_t)random.bits();
    }
    const Floats halves = out(load_f16(h));
    for (int i = 0; i < 16; ++i) {
      check(same(halves.at[i], half_to_float(h[i])), "%s load_f16(%04x) is %g", isa, h[i], halves.at[i]);
      check(same(from_f16(h[i]), half_to_float(h[i])), "%s from_f16(%04x)", isa, h[i]);
      if (!std::isnan(half_to_float(h[i]))) check(to_f16(half_to_float(h[i])) == h[i], "%s to_f16 of %04x", isa, h[i]);
    }
  }
}

static void check_arithmetic(const char* isa, Random& random) {
  const float special[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1.0f, 1e-40f, 3.4e38f};
  for (int repeat = 0; repeat < rounds(3000); ++repeat) {
    alignas(64) float a[16], b[16], c[16];
    for (int i = 0; i < 16; ++i) {
      a[i] = repeat % 3 ? random.normal() * 100 : from_bits(random.bits());
      b[i] = repeat % 3 ? random.normal() : special[random.below(8)];
      c[i] = repeat % 5 ? random.normal() * 1e-3f : special[random.below(8)];
    }
    const F x = load(a), y = load(b), z = load(c);
    const Floats fused = out(fma(x, y, z)), negated = out(fnma(x, y, z)), top = out(max(x, y)), bottom = out(min(x, y)),
                 rounded = out(round(x)), size = out(abs(x)), chosen = out(less(x, y, z, y));
    for (int i = 0; i < 16; ++i) {
      check(same(fused.at[i], exact_fma(a[i], b[i], c[i])), "%s fma(%g, %g, %g) is %g", isa, a[i], b[i], c[i], fused.at[i]);
      check(same(negated.at[i], exact_fma(-a[i], b[i], c[i])), "%s fnma(%g, %g, %g) is %g", isa, a[i], b[i], c[i],
            negated.at[i]);
      check(same(top.at[i], a[i] > b[i] ? a[i] : b[i]), "%s max(%g, %g) is %g", isa, a[i], b[i], top.at[i]);
      check(same(bottom.at[i], a[i] < b[i] ? a[i] : b[i]), "%s min(%g, %g) is %g", isa, a[i], b[i], bottom.at[i]);
      check(same(rounded.at[i], std::nearbyint(a[i])), "%s round(%g) is %g", isa, a[i], rounded.at[i]);
      check(same(chosen.at[i], a[i] < b[i] ? c[i] : b[i]), "%s less(%g, %g) chose %g", isa, a[i], b[i], chosen.at[i]);
      check(same(size.at[i], std::fabs(a[i])), "%s abs(%g)", isa, a[i]);
    }
    uint32_t reached = 0;
    for (int i = 0; i < 16; ++i) reached |= (uint32_t)(a[i] >= b[i]) << i;
    check(at_least(x, y) == reached, "%s at_least: %04x, not %04x", isa, at_least(x, y), reached);
    float tree[16];
    memcpy(tree, b, sizeof tree);
    for (int half = 8; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) tree[i] = tree[i] + tree[i + half];
    check(same(sum(y), tree[0]), "%s sum: %g, not %g", isa, sum(y), tree[0]);
    float most = -INFINITY;
    bool nan = false;
    for (float e : b) {
      nan = nan || std::isnan(e);
      most = e > most ? e : most;
    }
    check(any_nan(y) == nan, "%s any_nan", isa);
    if (!nan) check(largest(y) == most, "%s largest: %g, not %g", isa, largest(y), most);
  }
  for (int n = -252; n <= 252; ++n) {  // down into the denormals and up to infinity, rounded once
    alignas(64) float a[16];
    for (float& e : a) e = 0.5f + random.uniform();
    const Floats scaled = out(scale2(load(a), set((float)n)));
    for (int i = 0; i < 16; ++i)
      check(same(scaled.at[i], std::ldexp(a[i], n)), "%s scale2(%g, %d) is %g", isa, a[i], n, scaled.at[i]);
  }
  for (int first = 0; first < 256; first += 16) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = (uint8_t)(first + i);
    const Floats powers = out(load_e8(bytes));
    for (int i = 0; i < 16; ++i)
      check(same(powers.at[i], std::ldexp(1.0f, bytes[i] - 128)), "%s load_e8(%d) is %g", isa, bytes[i], powers.at[i]);
  }
}

static void check_integers(const char* isa, Random& random) {
  for (int repeat = 0; repeat < rounds(3000); ++repeat) {
    alignas(64) int32_t v[16];
    int8_t bytes[16], stored[16];
    alignas(64) float f[16];
    int32_t total = 0;
    for (int i = 0; i < 16; ++i) {
      v[i] = (int32_t)random.bits();
      bytes[i] = (int8_t)random.bits();
      f[i] = (float)(random.below(65536) - 32768) * 0.5f;
      total += v[i] >> 8;
    }
    const I x = load_bytes(v);
    check(isum(sar<8>(x)) == total, "%s isum", isa);
    const Ints left = out_int(shl<8>(x)), right = out_int(sar<8>(x)), wide = out_int(load_i8(bytes)),
               unsign = out_int(load_u8(bytes)), near = out_int(to_int(load(f)));
    const Ints difference = out_int(isub(sar<1>(x), iset(77))), added = out_int(iadd(sar<1>(x), iset(-77)));
    const Floats floats = out(to_float(x));
    store_i8(stored, load_i8(bytes));
    for (int i = 0; i < 16; ++i) {
      check(left.at[i] == (int32_t)((uint32_t)v[i] << 8) && right.at[i] == v[i] >> 8, "%s shift of %d", isa, v[i]);
      check(wide.at[i] == bytes[i] && unsign.at[i] == (uint8_t)bytes[i] && stored[i] == bytes[i], "%s byte %d", isa, bytes[i]);
      check(near.at[i] == (int)std::nearbyint(f[i]), "%s to_int(%g) is %d", isa, f[i], near.at[i]);
      check(floats.at[i] == (float)v[i], "%s to_float(%d)", isa, v[i]);
      check(difference.at[i] == (v[i] >> 1) - 77 && added.at[i] == difference.at[i], "%s isub and iadd", isa);
    }
  }
}

static void check_e4m3(const char* isa) {
  for (int round = 0; round < 512; ++round) {  // all codes; then some, beside others without subnormal ones
    uint8_t codes[64];
    alignas(64) uint16_t wide[2][32];
    for (int i = 0; i < 64; ++i)
      codes[i] = round < 4 ? (uint8_t)(64 * round + i) : i == round % 64 ? (uint8_t)(round * 37) : (uint8_t)(i | 8);
    store_bytes(wide[0], expand_e4m3<0>(codes));
    store_bytes(wide[1], expand_e4m3<1>(codes));
    for (int i = 0; i < 64; ++i) {
      const float want = e4m3_to_float(codes[i]), got = from_bits((uint32_t)wide[i % 2][i / 2] << 16);
      if (std::isnan(want)) continue;
      check(to_bits(got * 256) == to_bits(want), "%s expand_e4m3(%02x) is %g / 256, not %g", isa, codes[i], got * 256, want);
      check(got == 0 || std::fabs(got) >= 1.2e-38f, "%s expand_e4m3(%02x) is subnormal", isa, codes[i]);
    }
  }
}

static void check_bytes(const char* isa, Random& random) {
  for (int repeat = 0; repeat < rounds(300); ++repeat) {
    alignas(64) uint8_t x[64], up[64], down[64], in_place[64], found[64], joined[64], chosen[64], other[64];
    alignas(64) uint32_t rotated[16], words[16];
    uint8_t table[16];
    for (uint8_t& e : x) e = (uint8_t)random.bits();
    for (uint8_t& e : table) e = (uint8_t)random.bits();
    const B b = load_bytes(x);
    store_bytes(up, move_bits(b, 1, 4, 2));
    store_bytes(down, move_bits(b, 6, 0, 2));
    store_bytes(in_place, move_bits(b, 4, 4, 1));
    store_bytes(found, look_up(table, move_bits(b, 0, 0, 4)));
    store_bytes(joined, join_bits(move_bits(b, 0, 0, 4), move_bits(b, 7, 4, 1)));
    store_bytes(chosen, select_bits(0x3c, b, look_up(table, move_bits(b, 4, 0, 4))));
    store_bytes(other, xor_bits(b, load_bytes(found)));
    store_bytes(rotated, rotate<7>(b));
    memcpy(words, x, sizeof words);
    for (int i = 0; i < 16; ++i) check(rotated[i] == (words[i] << 7 | words[i] >> 25), "%s rotate of %08x", isa, words[i]);
    const Floats scales = out(load_e5m3(x + 3));
    for (int i = 0; i < 16; ++i) {
      const float want = half_to_float((uint16_t)(x[3 + i] << 7));
      check(same(scales.at[i], want), "%s load_e5m3(%02x) is %g, not %g", isa, x[3 + i], scales.at[i], want);
    }
    int32_t total = 0;
    for (int i = 0; i < 64; ++i) {
      const int e = x[i];
      check(up[i] == (e >> 1 & 3) << 4 && down[i] == e >> 6 && in_place[i] == (e & 16), "%s move_bits of %02x", isa, e);
      check(found[i] == table[e & 15] && joined[i] == (e & 15) + (e >> 7 << 4), "%s bytes of %02x", isa, e);
      check(chosen[i] == ((e & 0x3c) | (table[e >> 4] & 0xc3)) && other[i] == (e ^ found[i]), "%s bits of %02x", isa, e);
      if (i >= 8 && i < 24) total += (int8_t)x[i];
    }
    const Ints sums = out_int(sum16_i8(x + 8));
    for (int32_t sum : sums.at) check(sum == total, "%s sum16_i8: %d, not %d", isa, sum, total);
  }
}

static void check_halves(const char* isa, Random& random) {
  for (int repeat = 0; repeat < rounds(300); ++repeat) {
    alignas(64) float x[16];
    uint8_t bytes[16];
    int8_t small[16];
    alignas(64) uint16_t wide[32], pairs[32];
    for (int i = 0; i < 16; ++i) {
      x[i] = random.normal();
      bytes[i] = (uint8_t)random.bits();
      small[i] = (int8_t)random.bits();
      wide[i] = wide[i + 16] = (uint16_t)random.bits();
    }
    const F a = load(x);
    const Floats sums[] = {out(butterfly<1>(a)), out(butterfly<2>(a)), out(butterfly<4>(a)), out(butterfly<8>(a))};
    I low, high;
    look_up_halves(small, bytes, low, high);
    const Ints first = out_int(low), second = out_int(high);
    store_bytes(pairs, look_up_pairs(wide, bytes));
    for (int i = 0; i < 16; ++i) {
      for (int step = 0; step < 4; ++step) {
        const int h = 1 << step;
        const float want = i & h ? x[i - h] - x[i] : x[i] + x[i + h];
        check(sums[step].at[i] == want, "%s butterfly<%d>: lane %d is %g, not %g", isa, h, i, sums[step].at[i], want);
      }
      check(first.at[i] == small[bytes[i] & 15] && second.at[i] == small[bytes[i] >> 4], "%s look_up_halves: lane %d", isa, i);
      check(pairs[2 * i] == wide[bytes[i] & 15] && pairs[2 * i + 1] == wide[bytes[i] >> 4], "%s look_up_pairs: lane %d", isa,
            i);
    }
  }
}

static void check_dots(const char* isa, Random& random) {
  for (int repeat = 0; repeat < rounds(3000); ++repeat) {
    alignas(64) uint8_t w[64];
    int8_t a[4];
    const int style = repeat % 4;  // extremes saturate a naive maddubs
    for (uint8_t& e : w) e = style == 0 ? 255 : (uint8_t)random.bits();
    for (int8_t& e : a) e = style < 2 ? -128 : style == 2 ? 127 : (int8_t)random.bits();
    const B codes = load_bytes(w), spread = broadcast4(a);
    const Ints any = out_int(dot_u8(iset(1000), codes, spread));
    const Ints low = out_int(dot_u7(iset(1000), move_bits(codes, 0, 0, 4), spread)),
               high = out_int(dot_u7(iset(-5), move_bits(codes, 4, 0, 4), spread));
    I pairs = izero();
    for (int i = 0; i < 8; ++i) pairs = pairs_u7(pairs, move_bits(codes, 0, 0, 4), spread);
    const Ints group = out_int(add_pairs(pairs)), seven = out_int(dot_u7(iset(3), move_bits(codes, 1, 0, 7), spread));
    for (int i = 0; i < 16; ++i) {
      int32_t u8 = 1000, lo = 1000, hi = -5, u7 = 3;
      for (int k = 0; k < 4; ++k) {
        u8 += (w[4 * i + k] - dot_bias) * a[k];
        lo += (w[4 * i + k] & 15) * a[k];
        hi += (w[4 * i + k] >> 4) * a[k];
        u7 += (w[4 * i + k] >> 1) * a[k];
      }
      check(seven.at[i] == u7, "%s dot_u7: %d, not %d", isa, seven.at[i], u7);
      check(any.at[i] == u8, "%s dot_u8: %d, not %d", isa, any.at[i], u8);
      check(low.at[i] == lo && high.at[i] == hi, "%s dot_u7: %d %d, not %d %d", isa, low.at[i], high.at[i], lo, hi);
      check(group.at[i] == 8 * (lo - 1000), "%s add_pairs: %d, not %d", isa, group.at[i], 8 * (lo - 1000));
    }
    alignas(64) uint16_t bw[32], ba[32];
    alignas(64) float acc[16];
    for (int i = 0; i < 32; ++i) {
      bw[i] = (uint16_t)(to_bits(random.normal()) >> 16);
      ba[i] = (uint16_t)(to_bits(random.normal()) >> 16);
      acc[i / 2] = random.normal();
    }
    const Floats dot = out(dot_bf16(load(acc), load_bytes(bw), load_bytes(ba)));
    for (int i = 0; i < 16; ++i) {
      const double p0 = (double)from_bf16(bw[2 * i]) * from_bf16(ba[2 * i]),
                   p1 = (double)from_bf16(bw[2 * i + 1]) * from_bf16(ba[2 * i + 1]);
      const double bound = 2e-7 * (std::fabs(acc[i]) + std::fabs(p0) + std::fabs(p1));
      check(std::fabs(dot.at[i] - (acc[i] + p0 + p1)) <= bound, "%s dot_bf16: %.9g, not %.9g", isa, dot.at[i],
            acc[i] + p0 + p1);
    }
  }
}

static void check_pairs(const char* isa, Random& random) {
  for (int repeat = 0; repeat < rounds(1000); ++repeat) {
    alignas(64) uint16_t a[32], b[32];
    alignas(64) float even[16], odd[16];
    for (int i = 0; i < 32; ++i) {
      a[i] = (uint16_t)(to_bits(random.normal()) >> 16);
      b[i] = (uint16_t)(to_bits(random.normal()) >> 16);
    }
    B x, y;
    pair_columns(load_bytes(a), load_bytes(b), x, y);
    F first = even_bf16(x), second = even_bf16(y), first_b = odd_bf16(x), second_b = odd_bf16(y);
    in_columns(first, second);
    in_columns(first_b, second_b);
    const Floats columns[2] = {out(first), out(second)}, columns_b[2] = {out(first_b), out(second_b)};
    for (int i = 0; i < 32; ++i)
      check(columns[i / 16].at[i % 16] == from_bf16(a[i]) && columns_b[i / 16].at[i % 16] == from_bf16(b[i]),
            "%s pair_columns, in_columns: column %d", isa, i);

    for (int i = 0; i < 16; ++i) {
      even[i] = repeat % 8 ? random.normal() : i % 3 ? 0.0f : NAN;
      odd[i] = random.uniform();
    }
    alignas(64) uint16_t pairs[32], rounded[2][16];
    store_bytes(pairs, round_pair_bf16(load(even), load(odd)));
    round_bf16(rounded[0], load(even));
    round_bf16(rounded[1], load(odd));
    for (int i = 0; i < 32; ++i)
      check(pairs[i] == rounded[i % 2][i / 2], "%s round_pair_bf16: number %d is %04x, not %04x", isa, i, pairs[i],
            rounded[i % 2][i / 2]);
  }
  alignas(64) uint32_t square[16][16], turned[16][16];
  for (auto& row : square)
    for (uint32_t& e : row) e = random.bits();
  B rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = load_bytes(square[i]);
  transpose(rows);
  for (int i = 0; i < 16; ++i) store_bytes(turned[i], rows[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) check(turned[j][i] == square[i][j], "%s transpose: [%d][%d]", isa, j, i);
}

// e^x from -106 to 90 and at the ends; 2^x down from 0; silu.
static void check_math(const char* isa, std::vector<uint32_t>& bits) {
  double worst = 0, worst2 = 0;
  const int steps = rounds(40000);
  for (int step = 0; step < steps; ++step) {
    alignas(64) float x[16], minus[16];
    for (int i = 0; i < 16; ++i) {
      x[i] = -106.0f + 196.0f * (float)(step * 16 + i) / (16.0f * (float)steps);
      minus[i] = -160.0f * (float)(step * 16 + i) / (16.0f * (float)steps);
    }
    const Floats e = out(exp(load(x))), e2 = out(exp2(load(minus))), s = out(silu(load(x)));
    for (int i = 0; i < 16; ++i) {
      const double want = std::exp((double)x[i]), want2 = std::exp2((double)minus[i]);
      if (want > 1.2e-38 && want < 3.4e38)
        worst = std::fmax(worst, std::fabs(e.at[i] / want - 1));
      else
        check(want < 1 ? std::fabs(e.at[i] - want) <= 1.2e-7 * want + 1.5e-45 : std::isinf(e.at[i]) || want < 3.41e38,
              "%s exp(%g) is %g", isa, x[i], e.at[i]);
      if (want2 > 1.2e-38)
        worst2 = std::fmax(worst2, std::fabs(e2.at[i] / want2 - 1));
      else
        check(std::fabs(e2.at[i] - want2) <= 2e-7 * want2 + 1.5e-45, "%s exp2(%g) is %g", isa, minus[i], e2.at[i]);
      const double sigmoid = x[i] / (1 + std::exp(-(double)x[i]));
      if (x[i] > -87)
        check(std::fabs(s.at[i] - sigmoid) <= 4e-7 * std::fabs(sigmoid), "%s silu(%g) is %g, not %g", isa, x[i], s.at[i],
              sigmoid);
      else
        check(std::fabs(s.at[i]) <= 1e-35, "%s silu(%g) is %g", isa, x[i], s.at[i]);
      for (float y : {e.at[i], e2.at[i], s.at[i]}) bits.push_back(to_bits(y));
    }
  }
  check(worst < 1.2e-7, "%s exp: relative error %.3g", isa, worst);
  check(worst2 < 2e-7, "%s exp2: relative error %.3g", isa, worst2);
  const struct {
    float x, exp, exp2;
  } ends[] = {{-INFINITY, 0, 0}, {-3e38f, 0, 0}, {0, 1, 1}, {-0.0f, 1, 1}, {NAN, NAN, NAN}};
  for (const auto& end : ends) {
    check(same(out(exp(set(end.x))).at[5], end.exp), "%s exp(%g) is %g", isa, end.x, out(exp(set(end.x))).at[5]);
    check(same(out(exp2(set(end.x))).at[5], end.exp2), "%s exp2(%g) is %g", isa, end.x, out(exp2(set(end.x))).at[5]);
  }
  check(std::isinf(out(exp(set(INFINITY))).at[3]) && std::isinf(out(exp(set(3e38f))).at[3]), "%s exp(inf)", isa);
}

static void check_lanes(const char* isa, std::vector<uint32_t>& bits) {
  Random random(17);
  check_memory(isa, random);
  check_arithmetic(isa, random);
  check_integers(isa, random);
  check_e4m3(isa);
  check_dots(isa, random);
  check_bytes(isa, random);
  check_halves(isa, random);
  check_pairs(isa, random);
  check_math(isa, bits);
}
}  // namespace dso::DSO_ISA_NAMESPACE
