#include <sys/auxv.h>

#include <cstdio>

#include "../cpu_features.hpp"

namespace dso {
namespace {

// Bits of AT_HWCAP and AT_HWCAP2 (asm/hwcap.h), which older kernel headers lack.
constexpr unsigned long kHwcapAsimd = 1ul << 1, kHwcapCpuid = 1ul << 11, kHwcapAsimdDp = 1ul << 20, kHwcapSve = 1ul << 22;
constexpr unsigned long kHwcap2Sve2 = 1ul << 1, kHwcap2I8mm = 1ul << 13, kHwcap2Bf16 = 1ul << 14;

constexpr FeatureName kNames[] = {
    {kAsimd, "asimd"}, {kDotProd, "asimddp"}, {kI8mm, "i8mm"}, {kArmBf16, "bf16"}, {kSve, "sve"}, {kSve2, "sve2"},
};

// The main ID register, which the kernel lets programs read: implementer in bits 24 to 31, part number in bits 4 to 15. 0 if
// not.
uint64_t main_id() {
  uint64_t id = 0;
  if (getauxval(AT_HWCAP) & kHwcapCpuid) __asm__("mrs %0, MIDR_EL1" : "=r"(id));
  return id;
}

struct Named {
  uint32_t number;
  const char* name;
};
constexpr Named kImplementers[] = {
    {0x41, "ARM"},      {0x46, "Fujitsu"}, {0x48, "HiSilicon"}, {0x4e, "NVIDIA"}, {0x50, "APM"},
    {0x51, "Qualcomm"}, {0x61, "Apple"},   {0x6d, "Microsoft"}, {0xc0, "Ampere"},
};
constexpr Named kParts[] = {
    // of ARM
    {0xd03, "Cortex-A53"},  {0xd05, "Cortex-A55"},  {0xd07, "Cortex-A57"},  {0xd08, "Cortex-A72"},
    {0xd0b, "Cortex-A76"},  {0xd0c, "Neoverse-N1"}, {0xd40, "Neoverse-V1"}, {0xd47, "Cortex-A710"},
    {0xd49, "Neoverse-N2"}, {0xd4f, "Neoverse-V2"}, {0xd84, "Neoverse-V3"}, {0xd8e, "Neoverse-N3"},
};

std::string hex(uint32_t number) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%02x", number);
  return text;
}

}  // namespace

uint32_t detect_features() {
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  uint32_t f = 0;
  auto add = [&f](bool has, Feature x) { f |= has ? uint32_t(x) : 0; };
  add(one & kHwcapAsimd, kAsimd);
  add(one & kHwcapAsimdDp, kDotProd);
  add(one & kHwcapSve, kSve);
  add(two & kHwcap2Sve2, kSve2);
  add(two & kHwcap2I8mm, kI8mm);
  add(two & kHwcap2Bf16, kArmBf16);
  return f;
}

std::span<const FeatureName> known_features() { return kNames; }

std::string cpu_vendor() {
  const uint32_t implementer = uint32_t(main_id() >> 24 & 0xff);
  for (const Named& n : kImplementers)
    if (n.number == implementer) return n.name;
  return implementer ? hex(implementer) : "";
}

std::string cpu_model() {
  const uint64_t id = main_id();
  const uint32_t part = uint32_t(id >> 4 & 0xfff);
  if ((id >> 24 & 0xff) == 0x41)
    for (const Named& n : kParts)
      if (n.number == part) return n.name;
  return id ? "part " + hex(part) : "";
}

std::string request_permission(uint32_t) { return ""; }

}  // namespace dso
