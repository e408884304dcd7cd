#include "cpu_features.hpp"

#include <unistd.h>

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

std::string known(int name) { return std::to_string(std::max(0l, sysconf(name))); }

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
  return out + "], \"caches\": {\"l1d\": " + known(_SC_LEVEL1_DCACHE_SIZE) + ", \"l2\": " + known(_SC_LEVEL2_CACHE_SIZE) +
         ", \"l3\": " + known(_SC_LEVEL3_CACHE_SIZE) + "}, \"cores\": " + known(_SC_NPROCESSORS_ONLN) + "}";
}

}  // namespace dso
