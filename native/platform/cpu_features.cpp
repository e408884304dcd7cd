#include "cpu_features.hpp"

#include <algorithm>

namespace dso {
namespace {

std::string json_string(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}

std::string known(int64_t size) { return std::to_string(std::max(int64_t(0), size)); }

}  // namespace

std::string feature_names(uint32_t features) {
  std::string out;
  for (const FeatureName& n : known_features())
    if (features & n.feature) out += (out.empty() ? "" : ", ") + std::string(n.name);
  return out;
}

std::string describe_cpu() {
  std::string out =
      "{\"vendor\": " + json_string(cpu_vendor()) + ", \"model\": " + json_string(cpu_model()) + ", \"features\": [";
  const uint32_t features = detect_features();
  const char* comma = "";
  for (const FeatureName& n : known_features()) {
    if (!(features & n.feature)) continue;
    out += comma + json_string(n.name);
    comma = ", ";
  }
  const CpuSizes sizes = cpu_sizes();
  return out + "], \"caches\": {\"l1d\": " + known(sizes.l1d) + ", \"l2\": " + known(sizes.l2) +
         ", \"l3\": " + known(sizes.l3) + "}, \"cores\": " + known(sizes.cores) + "}";
}

}  // namespace dso
