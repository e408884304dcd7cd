#include "isa.hpp"

#include <cstring>

#include "cpu_features.hpp"
#include "error.hpp"

namespace dso {

namespace {

uint32_t features_here() {
  static const uint32_t features = detect_features();
  return features;
}

}  // namespace

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
    if (const std::string why = request_permission(isa->needs); !why.empty())
      fail(DSO_EISA, "ISA \"%s\" cannot run on this machine: %s", name, why.c_str());
    return *isa->kernels();
  }
  for (auto isa = isas().rbegin(); isa != isas().rend(); ++isa)
    if (isa->automatic && runs_here(*isa) && request_permission(isa->needs).empty()) return *isa->kernels();
  const Isa& least = isas().front();
  fail(DSO_EISA, "no ISA of this build runs on this machine: %s needs %s", least.name,
       feature_names(least.needs & ~features_here()).c_str());
}

}  // namespace dso
