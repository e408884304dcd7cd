#include <sys/sysctl.h>

#include "../cpu_features.hpp"

namespace dso {
namespace {

constexpr FeatureName kNames[] = {{kAsimd, "asimd"}, {kDotProd, "asimddp"}, {kI8mm, "i8mm"}, {kArmBf16, "bf16"}};

int64_t number(const char* name) {
  int64_t value = 0;  // the system writes four or eight bytes, in the order in which this is right for both
  size_t bytes = sizeof value;
  return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 ? value : 0;
}

// The performance cores' caches where the cores differ.
int64_t of_fast_cores(const char* of_level, const char* of_all) {
  const int64_t value = number(of_level);
  return value ? value : number(of_all);
}

}  // namespace

uint32_t detect_features() {
  uint32_t f = kAsimd;
  auto add = [&f](const char* name, Feature x) { f |= number(name) ? uint32_t(x) : 0; };
  add("hw.optional.arm.FEAT_DotProd", kDotProd);
  add("hw.optional.arm.FEAT_I8MM", kI8mm);
  add("hw.optional.arm.FEAT_BF16", kArmBf16);
  return f;
}

std::span<const FeatureName> known_features() { return kNames; }

std::string cpu_vendor() { return "Apple"; }

std::string cpu_model() {
  char model[128] = {};
  size_t bytes = sizeof model - 1;
  return sysctlbyname("machdep.cpu.brand_string", model, &bytes, nullptr, 0) == 0 ? model : "";
}

std::string request_permission(uint32_t) { return ""; }

CpuSizes cpu_sizes() {
  return {of_fast_cores("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"),
          of_fast_cores("hw.perflevel0.l2cachesize", "hw.l2cachesize"), number("hw.l3cachesize"), number("hw.logicalcpu")};
}

}  // namespace dso
