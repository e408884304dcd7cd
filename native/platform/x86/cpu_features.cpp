#include "../cpu_features.hpp"

#include <cpuid.h>

#include <cstring>

namespace dso {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves r unchanged past the highest leaf
  return r;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

constexpr FeatureName kNames[] = {
    {kAvx2, "avx2"},
    {kFma, "fma"},
    {kF16c, "f16c"},
    {kBmi2, "bmi2"},
    {kAvxVnni, "avx_vnni"},
    {kAvx512f, "avx512f"},
    {kAvx512bw, "avx512bw"},
    {kAvx512dq, "avx512dq"},
    {kAvx512vl, "avx512vl"},
    {kAvx512Vnni, "avx512_vnni"},
    {kAvx512Bf16, "avx512_bf16"},
    {kAmxTile, "amx_tile"},
    {kAmxInt8, "amx_int8"},
    {kAmxBf16, "amx_bf16"},
};

}  // namespace

uint32_t detect_features() {
  const Registers one = cpuid(1);
  if (!bit(one.c, 27)) return 0;  // OSXSAVE: without it the system does not save vector registers
  const uint64_t state = xcr0();
  const bool ymm = (state & 0x6) == 0x6, zmm = ymm && (state & 0xe0) == 0xe0, tiles = (state & 0x60000) == 0x60000;
  const Registers seven = cpuid(7), seven_one = seven.a >= 1 ? cpuid(7, 1) : Registers{};
  uint32_t f = 0;
  auto add = [&f](bool has, Feature x) { f |= has ? uint32_t(x) : 0; };
  if (ymm && bit(one.c, 28)) {
    add(bit(seven.b, 5), kAvx2);
    add(bit(one.c, 12), kFma);
    add(bit(one.c, 29), kF16c);
    add(bit(seven.b, 8), kBmi2);
    add(bit(seven_one.a, 4), kAvxVnni);
  }
  if (zmm && bit(seven.b, 16)) {
    add(true, kAvx512f);
    add(bit(seven.b, 30), kAvx512bw);
    add(bit(seven.b, 17), kAvx512dq);
    add(bit(seven.b, 31), kAvx512vl);
    add(bit(seven.c, 11), kAvx512Vnni);
    add(bit(seven_one.a, 5), kAvx512Bf16);
  }
  if (tiles && bit(seven.d, 24) && system_has_tiles()) {
    add(true, kAmxTile);
    add(bit(seven.d, 25), kAmxInt8);
    add(bit(seven.d, 22), kAmxBf16);
  }
  return f;
}

std::span<const FeatureName> known_features() { return kNames; }

std::string cpu_vendor() {
  const Registers zero = cpuid(0);
  char vendor[13] = {};
  std::memcpy(vendor, &zero.b, 4);
  std::memcpy(vendor + 4, &zero.d, 4);
  std::memcpy(vendor + 8, &zero.c, 4);
  return vendor;
}

std::string cpu_model() {
  if (cpuid(0x80000000).a < 0x80000004) return "";
  char raw[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002 + i);
    std::memcpy(raw + 16 * i, &r, 16);
  }
  std::string s(raw);
  s.erase(0, s.find_first_not_of(' '));
  s.erase(s.find_last_not_of(' ') + 1);
  return s;
}

std::string request_permission(uint32_t features) { return features & kAmxTile ? request_tiles() : ""; }

}  // namespace dso
