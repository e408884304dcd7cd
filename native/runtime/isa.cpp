#include "isa.hpp"

#include <cstring>

#include "cpu_features.hpp"
#include "error.hpp"

namespace dso {

namespace {

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma | kF16c | kBmi2;
constexpr uint32_t kNeedsAvx512 = kNeedsAvx2 | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl;
constexpr uint32_t kNeedsAvx512Bf16 = kNeedsAvx512 | kAvx512Vnni | kAvx512Bf16;
constexpr uint32_t kNeedsAmx = kNeedsAvx512Bf16 | kAmxTile | kAmxInt8 | kAmxBf16;

uint32_t features_here() {
  static const uint32_t features = detect_features();
  return features;
}

}  // namespace

const std::array<Isa, kIsas>& isas() {
  static constexpr std::array<Isa, kIsas> list = {{
      {"avx2", kNeedsAvx2, kernels_avx2, true},
      {"avx2-vnni", kNeedsAvx2 | kAvxVnni, kernels_avx2_vnni, true},
      {"avx512", kNeedsAvx512, kernels_avx512, true},
      {"avx512-vnni", kNeedsAvx512 | kAvx512Vnni, kernels_avx512_vnni, true},
      {"avx512-bf16", kNeedsAvx512Bf16, kernels_avx512_bf16, true},
      {"amx", kNeedsAmx, kernels_amx, true},
      {"amx-emulated", kNeedsAvx512Bf16, kernels_amx_emulated, false},
  }};
  return list;
}

const Isa* find_isa(const char* name) {
  for (const Isa& isa : isas())
    if (std::strcmp(isa.name, name) == 0) return &isa;
  return nullptr;
}

bool runs_here(const Isa& isa) { return isa.kernels() && (isa.needs & ~features_here()) == 0; }

const Kernels& choose_kernels(const char* name) {
  if (name) {
    const Isa* isa = find_isa(name);
    if (!isa) {
      std::string known;
      for (const Isa& i : isas()) known += (known.empty() ? "" : ", ") + std::string(i.name);
      fail(DSO_EISA, "unknown ISA \"%s\"; choose one of %s", name, known.c_str());
    }
    if (const uint32_t missing = isa->needs & ~features_here())
      fail(DSO_EISA, "ISA \"%s\" cannot run on this machine: the CPU or system lacks %s", name, feature_names(missing).c_str());
    if (!isa->kernels()) fail(DSO_EISA, "ISA \"%s\" is not in this build: the compiler does not support it", name);
    if (isa->needs & kAmxTile)
      if (const std::string why = request_amx(); !why.empty())
        fail(DSO_EISA, "ISA \"%s\" cannot run on this machine: %s", name, why.c_str());
    return *isa->kernels();
  }
  for (auto isa = isas().rbegin(); isa != isas().rend(); ++isa)
    if (isa->automatic && runs_here(*isa) && (!(isa->needs & kAmxTile) || request_amx().empty())) return *isa->kernels();
  fail(DSO_EISA, "no ISA of this build runs on this machine: avx2 needs %s",
       feature_names(kNeedsAvx2 & ~features_here()).c_str());
}

}  // namespace dso
