#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../cpu_features.hpp"

namespace dso {
namespace {

// arch_prctl codes from asm/prctl.h, which older kernel headers lack.
constexpr int kGetXcompSupported = 0x1021;
constexpr int kRequestXcompPermission = 0x1023;
constexpr int kTileData = 18;

}  // namespace

bool system_has_tiles() {
  uint64_t mask = 0;
  return syscall(SYS_arch_prctl, kGetXcompSupported, &mask) == 0 && ((mask >> kTileData) & 1);
}

std::string request_tiles() {
  if (syscall(SYS_arch_prctl, kRequestXcompPermission, kTileData) == 0) return "";
  return std::string("the system refused the tile registers (arch_prctl: ") + std::strerror(errno) + ")";
}

}  // namespace dso
