// Shared by the native tests: a check that counts failures, random numbers, guarded buffers, the variants that run on this
// machine, and the packed layout in plain scalar code (an independent implementation of dso.h).
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/kernels.hpp"
#include "dso.h"
#include "isa.hpp"

using namespace dso;

inline int failures = 0;
__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char* format, ...) {
  if (ok) return true;
  if (++failures <= 20) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAILED: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
  }
  return false;
}
// Checks that a call of the C interface returned an error code, and that the message contains `words`.
inline bool refuses(int32_t rc, int32_t code, const char* words, const char* what) {
  return check(rc == code && strstr(dso_last_error(), words), "%s: code %d (expected %d), message \"%s\" (expected \"%s\")",
               what, rc, code, dso_last_error(), words);
}
inline int report(const char* name) {
  printf("%s: %s (%d failures)\n", name, failures ? "FAILED" : "ok", failures);
  return failures ? 1 : 0;
}

// The number of random cases of a test: `n`, or with DSO_TEST_DIVISOR=20 a twentieth of it, at least one. For emulators, where
// all of them would take hours; `make test-arm` sets it.
inline int test_divisor() {
  static const int divisor = [] {
    const char* given = getenv("DSO_TEST_DIVISOR");
    return given && atoi(given) > 1 ? atoi(given) : 1;
  }();
  return divisor;
}
inline int rounds(int n) { return n > test_divisor() ? n / test_divisor() : 1; }
// The step through the fixed cases of a test: 1, or with a divisor n.
inline int every(int n) { return test_divisor() > 1 ? n : 1; }

struct Random {  // xorshift64*
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t bits() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)(state * 0x2545f4914f6cdd1du >> 32);
  }
  int below(int n) { return (int)(bits() % (uint32_t)n); }
  float uniform() { return (float)(bits() >> 8) * (1.0f / (1 << 24)); }  // [0, 1)
  float normal() {
    float s = 0;
    for (int i = 0; i < 12; ++i) s += uniform();
    return s - 6;
  }
  template <class T>
  void shuffle(std::vector<T>& x) {
    for (size_t i = x.size(); i > 1; --i) std::swap(x[i - 1], x[(size_t)below((int)i)]);
  }
};

inline std::vector<float> normal(size_t n, float scale, Random& random) {
  std::vector<float> x(n);
  for (float& v : x) v = scale * random.normal();
  return x;
}

inline const char* kv_name(int type) {
  return type == DSO_KV_F32 ? "f32" : type == DSO_KV_BF16 ? "bf16" : type == DSO_KV_INT8 ? "int8" : "int4";
}

// 64-aligned bytes between guards; the destructor checks that the guards are intact.
class Buffer {
 public:
  explicit Buffer(size_t bytes, uint8_t fill = 0xa5)
      : bytes_(bytes), memory_((uint8_t*)::operator new((bytes + 63) / 64 * 64 + 128, std::align_val_t(64))) {
    memset(memory_, guard, 64);
    memset(memory_ + 64, fill, bytes);
    memset(memory_ + 64 + bytes, guard, 64);
  }
  ~Buffer() {
    for (size_t i = 0; i < 64; ++i)
      if (!check(memory_[i] == guard && memory_[64 + bytes_ + i] == guard, "guard byte %zu of a buffer of %zu was overwritten",
                 i, bytes_))
        break;
    ::operator delete(memory_, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* get() { return memory_ + 64; }
  uint8_t& operator[](size_t i) { return memory_[64 + i]; }
  size_t size() const { return bytes_; }

 private:
  static constexpr uint8_t guard = 0xc3;
  size_t bytes_;
  uint8_t* memory_;
};

struct Variant {
  std::string name;
  const Kernels* kernels;
};
inline std::vector<Variant> variants() {  // those that were built and run on this machine
  std::vector<Variant> here;
  for (const Isa& isa : isas())
    if (runs_here(isa)) here.push_back({isa.name, isa.kernels()});
  check(!here.empty(), "no variant runs here");
  return here;
}

// Whether a variant has an instruction that adds pairs of bf16 products, with a rounding of its own.
inline bool has_dot_bf16(const std::string& isa) {
  return isa == "avx512-bf16" || isa.starts_with("amx") || isa == "neon-i8mm";
}

// One variant for each implementation of a kernel: variants may share it (runtime/variants.hpp).
template <class Part, class Kernel>
std::vector<Variant> variants_with_own(Kernel Part::* kernel) {
  std::vector<Variant> own;
  for (const Variant& v : variants()) {
    bool shared = false;
    for (const Variant& other : own) shared = shared || other.kernels->*kernel == v.kernels->*kernel;
    if (!shared) own.push_back(v);
  }
  return own;
}

// Those whose attention and row kernels are their own.
inline std::vector<Variant> vector_variants() { return variants_with_own(&Kernels::attn_prefill); }

// ---- scalar formats
inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + (float)mantissa, exponent - 25)
                                         : std::ldexp((float)mantissa, -24);
  return h >> 15 ? -magnitude : magnitude;
}
inline float e4m3_to_float(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 15 && mantissa == 7 ? NAN
                          : exponent                      ? std::ldexp(8.0f + (float)mantissa, exponent - 10)
                                                          : std::ldexp((float)mantissa, -9);
  return code >> 7 ? -magnitude : magnitude;
}
inline uint8_t to_e4m3(float x) {  // nearest even, |x| <= 448
  const float a = std::fabs(x);
  const int exponent = a < std::ldexp(1.0f, -6) ? -6 : std::ilogb(a);
  const int units = (int)std::nearbyint(std::ldexp((double)a, 3 - exponent));  // in units of the last place; 16 carries over
  return (uint8_t)((std::signbit(x) ? 0x80 : 0) |
                   (units + ((exponent + 6) << 3)));  // the implicit bit makes a subnormal normal
}
// Bitwise equal, or both NaN: the NaN that results from an operation on two NaNs depends on the processor.
inline bool same(float a, float b) { return to_bits(a) == to_bits(b) || (std::isnan(a) && std::isnan(b)); }
inline float rounded_bf16(float x) {  // nearest even
  const uint32_t u = to_bits(x);
  return std::isnan(x) ? x : from_bits((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

// ---- layouts
inline size_t tile_bytes(int format) {
  switch (format) {
    case DSO_F32:
      return 2048;
    case DSO_BF16:
      return 1024;
    case DSO_INT8:
    case DSO_FP8:
    case DSO_INT8_NESTED:
    case DSO_INT4_NESTED:
      return 544;
    case DSO_INT4:
      return 288;
    case DSO_Q4_1:
      return 320;
  }
  abort();
}
inline size_t code_bytes(int format) {
  return format == DSO_INT8 || format == DSO_FP8 ? 512 : format == DSO_BF16 ? 1024 : 256;
}  // before a tile's scales
inline const char* format_name(int format) {
  return format == DSO_INT8          ? "int8"
         : format == DSO_INT4        ? "int4"
         : format == DSO_Q4_1        ? "q4_1"
         : format == DSO_INT8_NESTED ? "int8_nested"
         : format == DSO_INT4_NESTED ? "int4_nested"
         : format == DSO_BF16        ? "bf16"
         : format == DSO_FP8         ? "fp8"
                                     : "f32";
}
inline size_t packed_bytes(int format, int64_t rows, int64_t cols) {
  return (size_t)((rows + 15) / 16 * ((cols + 31) / 32)) * ::tile_bytes(format);
}
inline int band_rows(int format) { return format == DSO_FP8 ? 128 : 16; }  // rows that pack_tile packs at a time
inline size_t row_bytes(int kind, int64_t width) {                         // of a slot
  const size_t wp = (size_t)(width + 31) / 32 * 32;
  const size_t bytes = kind == DSO_SLOT_BF16  ? 2 * wp
                       : kind == DSO_SLOT_Q8  ? wp + wp / 4
                       : kind == DSO_SLOT_Q16 ? 2 * wp + wp / 4
                                              : 4 * (size_t)width;
  return (bytes + 63) / 64 * 64;
}
// Position of the code of W[row, col]: the byte, and the shift of its 4 bits (0 for INT8).
inline size_t code_at(int format, int64_t row, int64_t col, int64_t cols, int* shift) {
  const size_t tile = (size_t)(row / 16 * ((cols + 31) / 32) + col / 32) * ::tile_bytes(format);
  const int r = (int)(row % 16), k = (int)(col % 32);
  if (format == DSO_FP8) return *shift = 0, tile + (size_t)((k / 4 * 16 + r) * 4 + (k % 4 == 1 ? 2 : k % 4 == 2 ? 1 : k % 4));
  *shift = format == DSO_INT8 ? 0 : k / 4 % 2 * 4;
  return tile + (size_t)((format == DSO_INT8 ? k / 4 : k / 8) * 64 + r * 4 + k % 4);
}
