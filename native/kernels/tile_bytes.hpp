// Bytes of a tile of a packed matrix, see dso.h: for the kernels of every ISA and for the runtime. Internal linkage, so that no
// copy compiled for one ISA can be the one that the linker keeps for all.
#pragma once
#include "dso.h"

namespace dso {

static constexpr int64_t tile_bytes(int32_t format) {  // -1: not a packed format
  switch (format) {
    case DSO_F32:
      return 2048;
    case DSO_BF16:
      return 1024;
    case DSO_INT8:
    case DSO_FP8:
      return 544;
    case DSO_INT4:
      return 288;
    case DSO_Q4_1:
      return 320;
    default:
      return -1;
  }
}

}  // namespace dso
