// AMX: the emulated tiles against the instructions' documentation, products on tiles against scalar code and against the vector
// kernels, and, if the host has AMX, the real tiles against the emulated ones, bit for bit.
#include <algorithm>
#include <utility>

#include "check.hpp"
#include "exact_fma.hpp"

#define DSO_ISA_NAMESPACE emulated
#include "../kernels/amx/tile_emulated.hpp"

namespace {
using dso::emulated::Tiles;

// ---- the tiles themselves

template <class T>
struct Block {  // a tile's memory, rows 64 bytes apart
  T at[16][64 / sizeof(T)];
};

void integers() {
  Random random(1);
  for (int k_bytes : {4, 32, 64})
    for (int rows0 : {1, 7, 16})
      for (int extreme : {0, 1, 2}) {
        const int rows1 = (rows0 * 3) % 16 + 1;
        Block<int8_t> a0, a1;
        Block<uint8_t> b;
        Block<int32_t> before, c0, c2;
        for (int i = 0; i < 1024; ++i) {
          a0.at[i / 64][i % 64] = (int8_t)(extreme == 1 ? -128 : random.below(256) - 128),
                            a1.at[i / 64][i % 64] = (int8_t)(extreme == 2 ? 127 : random.below(256) - 128);
          b.at[i / 64][i % 64] = (uint8_t)(extreme ? 255 : random.below(256));
        }
        for (int i = 0; i < 256; ++i) before.at[i / 16][i % 16] = (int32_t)random.bits() >> 8;
        memset(&c0, 0x5a, sizeof c0), memset(&c2, 0x5a, sizeof c2);
        Tiles tiles(k_bytes);
        tiles.shape(rows0, rows1);
        tiles.load<4>(&a0, 64), tiles.load<5>(&a1, 64), tiles.load<6>(&b, 64), tiles.load<0>(&before, 64);
        tiles.dot_s8_u8<0, 4, 6>(), tiles.dot_s8_u8<2, 5, 6>();
        tiles.store<0>(&c0, 64), tiles.store<2>(&c2, 64);
        for (int m = 0; m < 16; ++m)
          for (int n = 0; n < 16; ++n) {
            int32_t want0 = before.at[m][n], want2 = 0;
            for (int k = 0; k < k_bytes; ++k) {
              want0 += a0.at[m][k] * b.at[k / 4][4 * n + k % 4];
              want2 += a1.at[m][k] * b.at[k / 4][4 * n + k % 4];
            }
            if (m >= rows0) want0 = 0x5a5a5a5a;  // not stored
            if (m >= rows1) want2 = 0x5a5a5a5a;
            check(c0.at[m][n] == want0 && c2.at[m][n] == want2,
                  "dot_s8_u8, k %d, rows %d: (%d, %d) is %d and %d, not %d and %d", k_bytes, rows0, m, n, c0.at[m][n],
                  c2.at[m][n], want0, want2);
          }
      }
}

uint16_t bf16(float x) { return (uint16_t)(to_bits(x) >> 16); }  // for values that bf16 holds

// One row by one column: pairs (a, b), C before and after.
float dot(const std::vector<std::pair<float, float>>& ab, float c) {
  Block<uint16_t> a = {}, b = {};
  Block<float> out = {};
  for (size_t k = 0; k < ab.size(); ++k) a.at[0][k] = bf16(ab[k].first), b.at[k / 2][k % 2] = bf16(ab[k].second);
  out.at[0][0] = c;
  Tiles tiles(64);
  tiles.shape(1, 0);
  tiles.load<4>(&a, 64), tiles.load<6>(&b, 64), tiles.load<0>(&out, 64);
  tiles.dot_bf16<0, 4, 6>();
  tiles.store<0>(&out, 64);
  return out.at[0][0];
}

void floats() {
  const float big = 16777216.0f, small = std::ldexp(1.0f, -126);  // 2^24; the smallest normal number
  // Even and odd columns are separate chains: in a single chain the elements added to 2^24 would vanish.
  check(dot({{big, 1}, {1, 1}, {-big, 1}, {1, 1}}, 0) == 2.0f, "even and odd columns are one chain");
  // Columns ascending within a chain: 2^24 + 1 rounds back to 2^24.
  check(dot({{big, 1}, {0, 0}, {1, 1}, {0, 0}, {-big, 1}}, 0) == 0.0f, "the chain's order or its rounding is wrong");
  check(dot({{1, 1}, {0, 0}, {-big, 1}, {0, 0}, {big, 1}}, 0) == 1.0f, "the chain's order is wrong");
  // C is added last, to the sum of both chains.
  check(dot({{1, 1}, {1, 1}}, big) == big + 2, "C is not added last");
  check(dot({{-big, 1}, {1, 1}}, big) == 1.0f, "C is not added to the chains' sum");
  // Fused: the product's low bits reach the sum.
  const float x = 1 + std::ldexp(1.0f, -7);
  check(dot({{x, x}, {0, 0}, {-1, 1}}, 0) == std::fmaf(x, x, -1.0f), "the product is rounded");
  // Denormals count as zero: in A, in B, in C, as a result of the chain and of the final sum; signs are preserved.
  check(dot({{small / 2, 2}}, 0) == 0 && dot({{2, small / 2}}, 0) == 0, "a denormal input counts");
  check(dot({}, small / 2) == 0, "a denormal in C counts");
  check(dot({{small, 0.5f}, {0, 0}, {small, 0.5f}}, 0) == 0, "a denormal intermediate counts");
  check(dot({{1.5f * small, 1}}, -small) == 0, "a denormal result is not flushed");
  std::vector<std::pair<float, float>> last(32, {0, 0});  // the last pair: a zero product after it would be +0
  last[30] = last[31] = {small, -0.5f};
  check(std::signbit(dot(last, -0.0f)), "a flushed result loses its sign");
  check(dot({{small, 1}}, 0) == small, "the least normal number is flushed");
  check(std::isnan(dot({{INFINITY, 0}}, 1)) && std::isnan(dot({{1, NAN}}, 1)) && dot({{INFINITY, 2}}, 1) == INFINITY,
        "infinity or NaN is lost");
}

// ---- products

struct Run {
  int format, kind, rows, cols, T, tile_begin, tile_end, x_gap, y_gap;
  bool prefill;
};

// Random tiles with finite scales; equal for equal seeds.
std::vector<uint8_t> weights(int format, int rows, int cols, Random& random) {
  std::vector<float> w((size_t)(rows * cols));
  for (float& x : w) x = random.normal();
  std::vector<uint8_t> packed(packed_bytes(format, rows, cols));
  const int bands = format == DSO_FP8 ? (rows + 127) / 128 : (rows + 15) / 16;
  for (int tile = 0; tile < bands; ++tile)
    kernels_avx512_bf16()->pack_tile(format, DSO_SRC_F32, w.data(), rows, cols, 4 * cols, nullptr, tile, packed.data());
  return packed;
}

std::vector<uint8_t> product(const Kernels& k, const Run& r, const std::vector<uint8_t>& packed, const std::vector<float>& x,
                             const std::vector<float>& bias) {
  const size_t width = row_bytes(r.kind, r.cols), x_stride = width + 64 * (size_t)r.x_gap,
               y_stride = 4 * (size_t)(r.rows + r.y_gap);
  Buffer rows((size_t)(r.T - 1) * x_stride + width), data(packed.size()), y((size_t)(r.T - 1) * y_stride + 4 * (size_t)r.rows),
      scratch(k.linear_scratch);
  memcpy(data.get(), packed.data(), packed.size());
  for (int t = 0; t < r.T; ++t)
    k.convert(r.kind, &x[(size_t)(t * r.cols)], 0, r.cols, r.cols, rows.get() + (size_t)t * x_stride);
  k.linear({r.format, r.rows, r.cols, data.get()}, bias.data(), r.kind, rows.get(), (int64_t)x_stride, r.T, r.prefill,
           r.tile_begin, r.tile_end, (float*)y.get(), (int64_t)y_stride, scratch.get());
  return {y.get(), y.get() + y.size()};
}

// Both kernels must give the same bytes, including those outside the tiles.
void equal(const Kernels& a, const Kernels& b, Run r, Random& random) {
  const std::vector<uint8_t> packed = weights(r.format, r.rows, r.cols, random);
  std::vector<float> x((size_t)(r.T * r.cols)), bias((size_t)r.rows);
  for (float& e : x) e = random.normal();
  for (float& e : bias) e = random.normal();
  if (random.below(4) == 0) x[(size_t)random.below((int)x.size())] = random.below(2) ? NAN : INFINITY;
  const std::vector<uint8_t> got = product(a, r, packed, x, bias), want = product(b, r, packed, x, bias);
  for (size_t i = 0; i < want.size(); i += 4) {
    float p, q;
    memcpy(&p, &got[i], 4), memcpy(&q, &want[i], 4);
    if (!check(same(p, q), "%s %s kind %d [%d x %d] T %d tiles %d..%d prefill %d: float %zu is %.9g, %s has %.9g", a.isa,
               format_name(r.format), r.kind, r.rows, r.cols, r.T, r.tile_begin, r.tile_end, r.prefill, i / 4, p, b.isa, q))
      return;
  }
}

Run random_run(int format, int kind, Random& random) {
  const int dims[] = {1, 15, 16, 17, 31, 33, 53, 64, 100};
  Run r = {format, kind, dims[random.below(9)], dims[random.below(9)], 1 + random.below(70),
           0,      0,    random.below(3),       random.below(3),       random.below(2) == 1};
  if (random.below(6) == 0) r.cols = 32 * 16 + random.below(200);  // more groups than a panel
  const int tiles = (r.rows + 15) / 16;
  r.tile_begin = random.below(tiles), r.tile_end = r.tile_begin + 1 + random.below(tiles - r.tile_begin);
  return r;
}

void against_vectors(const Kernels& amx) {
  Random random(4);
  for (int format : {DSO_INT8, DSO_INT4, DSO_Q4_1})
    for (int kind : {DSO_SLOT_Q8, DSO_SLOT_Q16})
      for (int i = 0; i < 150; ++i) equal(amx, *kernels_avx512_bf16(), random_run(format, kind, random), random);
  for (int i = 0; i < 60; ++i) {  // the float kernels that tiles do not replace
    Run r = random_run(DSO_BF16, DSO_SLOT_BF16, random);
    r.prefill = false;
    equal(amx, *kernels_avx512_bf16(), r, random);
    equal(amx, *kernels_avx512_bf16(), random_run(DSO_F32, DSO_SLOT_F32, random), random);
  }
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// What TDPBF16PS makes of C and columns [begin, end), at most 32, of a row of each matrix: even and odd columns are added up
// separately, then their sum is added to C.
float tile_product(const float* x, const float* w, int begin, int end, float c) {
  float chain[2] = {0, 0};
  for (int k = begin; k < end; ++k) chain[k % 2] = flushed(exact_fma(flushed(x[k]), flushed(w[k]), chain[k % 2]));
  return flushed(c + flushed(chain[0] + chain[1]));
}

// FP8: codes, as 1/256 of their values, times activations, 128 columns at a time; then times their scale.
void fp8_products(const Kernels& amx) {
  Random random(7);
  for (int i = 0; i < 60; ++i) {
    Run r = random_run(DSO_FP8, DSO_SLOT_BF16, random);
    r.y_gap = 0;
    if (i % 4 == 0) r.cols = 100 + random.below(400);  // several scales
    std::vector<float> w((size_t)(r.rows * r.cols)), x((size_t)(r.T * r.cols)), bias((size_t)r.rows);
    for (float& e : w) e = random.normal() * (random.below(8) ? 1 : 1e-3f);  // some codes are subnormal
    for (float& e : x) e = from_bits(to_bits(random.normal()) & 0xffff0000);
    for (float& e : bias) e = random.normal();
    std::vector<uint8_t> packed(packed_bytes(DSO_FP8, r.rows, r.cols));
    for (int band = 0; band < (r.rows + 127) / 128; ++band)
      amx.pack_tile(DSO_FP8, DSO_SRC_F32, w.data(), r.rows, r.cols, 4 * r.cols, nullptr, band, packed.data());
    const std::vector<uint8_t> got = product(amx, r, packed, x, bias);
    for (int n = 16 * r.tile_begin; n < std::min(r.rows, 16 * r.tile_end); ++n) {
      std::vector<float> codes((size_t)r.cols), scales((size_t)(r.cols + 127) / 128);
      for (int k = 0; k < r.cols; ++k) {
        int shift;
        const size_t at = code_at(DSO_FP8, n, k, r.cols, &shift);
        codes[(size_t)k] = e4m3_to_float(packed[at]) / 256;
        memcpy(&scales[(size_t)k / 128], &packed[at / 544 * 544 + 512], 4);
      }
      for (int t = 0; t < r.T; ++t) {
        float acc = 0, value;
        for (int k = 0; k < r.cols; k += 128) {
          float sum = 0;
          for (int i = k; i < std::min(k + 128, r.cols); i += 32)
            sum = tile_product(&x[(size_t)(t * r.cols)], codes.data(), i, std::min(i + 32, r.cols), sum);
          acc = exact_fma(sum, 256 * scales[(size_t)k / 128], acc);
        }
        memcpy(&value, &got[(size_t)(t * r.rows + n) * 4], 4);
        if (!check(to_bits(value) == to_bits(acc + bias[(size_t)n]),
                   "%s fp8 [%d x %d] T %d: token %d output %d is %.9g, not %.9g", amx.isa, r.rows, r.cols, r.T, t, n, value,
                   acc + bias[(size_t)n]))
          return;
      }
    }
  }
}

// BF16 prefill: 32 columns at a time.
void bf16_prefill(const Kernels& amx) {
  Random random(5);
  for (int i = 0; i < 60; ++i) {
    Run r = random_run(DSO_BF16, DSO_SLOT_BF16, random);
    r.prefill = true, r.y_gap = 0;
    std::vector<float> w((size_t)(r.rows * r.cols)), x((size_t)(r.T * r.cols)), bias((size_t)r.rows);
    for (float& e : w) e = from_bits(to_bits(random.normal()) & 0xffff0000);
    for (float& e : x) e = from_bits(to_bits(random.normal() * (random.below(8) ? 1 : 1e-38f)) & 0xffff0000);
    for (float& e : bias) e = random.normal();
    std::vector<uint8_t> packed(packed_bytes(DSO_BF16, r.rows, r.cols));
    for (int tile = 0; tile < (r.rows + 15) / 16; ++tile)
      amx.pack_tile(DSO_BF16, DSO_SRC_F32, w.data(), r.rows, r.cols, 4 * r.cols, nullptr, tile, packed.data());
    const std::vector<uint8_t> got = product(amx, r, packed, x, bias);
    bool right = true;
    for (int t = 0; right && t < r.T; ++t)
      for (int n = 16 * r.tile_begin; right && n < std::min(r.rows, 16 * r.tile_end); ++n) {
        float c = 0;
        for (int k = 0; k < r.cols; k += 32)
          c = tile_product(&x[(size_t)(t * r.cols)], &w[(size_t)(n * r.cols)], k, std::min(k + 32, r.cols), c);
        float value;
        memcpy(&value, &got[(size_t)(t * r.rows + n) * 4], 4);
        right = check(to_bits(value) == to_bits(c + bias[(size_t)n]),
                      "%s bf16 prefill [%d x %d] T %d: token %d output %d is %.9g, not %.9g", amx.isa, r.rows, r.cols, r.T, t,
                      n, value, c + bias[(size_t)n]);
      }
  }
}
}  // namespace

// Whether the variant runs here; prints why not.
bool runs_here(const char* isa) {
  dso_context* context = nullptr;
  const bool runs = dso_context_create(isa, 1, &context) == 0;
  if (!runs) printf("test_amx: %s\n", dso_last_error());
  dso_context_destroy(context);
  return runs;
}

//   test_amx [--require]: where not even the emulation runs, it is an error (make test-amx)
int main(int argc, char** argv) {
  integers();
  floats();
  const Kernels* emulated = kernels_amx_emulated();
  const bool real = runs_here("amx") && kernels_amx();
  if (!runs_here("amx-emulated") || !emulated || !kernels_avx512_bf16()) {
    printf("test_amx: products on tiles were not tested\n");
    if (argc > 1 && strcmp(argv[1], "--require") == 0) return 2;
    return report("test_amx");
  }
  against_vectors(*emulated);
  bf16_prefill(*emulated);
  fp8_products(*emulated);
  if (real) {
    against_vectors(*kernels_amx());
    bf16_prefill(*kernels_amx());
    fp8_products(*kernels_amx());
    Random random(6);
    for (int format : {DSO_BF16, DSO_FP8})
      for (int i = 0; i < 100; ++i) equal(*kernels_amx(), *emulated, random_run(format, DSO_SLOT_BF16, random), random);
  } else {
    printf("test_amx: products were tested on emulated tiles only\n");
  }
  return report("test_amx");
}
