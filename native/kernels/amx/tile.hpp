// AMX tile registers. tile_emulated.hpp implements the same class in plain code.
//
// Eight tiles of fixed roles, for blocks of 2 x 2 products: C in 0..3, A in 4 and 5, B in 6 and 7; C0 = A4 B6, C1 = A4 B7,
// C2 = A5 B6, C3 = A5 B7. Rows past a token tail are configured away, not computed.
//
// Inline assembly, because the compiler's intrinsics need the tile's number as a literal, and reject a template argument.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace dso::DSO_ISA_NAMESPACE {
namespace {

class Tiles {
 public:
  // A tiles have rows of k_bytes, B tiles k_bytes / 4 rows of 64 bytes, C tiles rows of 64 bytes.
  explicit Tiles(int k_bytes) : k_bytes_(k_bytes) { ask_permission(); }
  ~Tiles() { __asm__ volatile("tilerelease"); }  // so that the core can enter deep sleep again
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // rows0 (1..16): rows of A4, C0 and C1; rows1 (0..16): rows of A5, C2 and C3, which must not be used if it is 0. Zeroes the
  // tiles. Must be called first. The configuration belongs to this thread; other code (oneDNN) may have changed it since.
  void shape(int rows0, int rows1) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    auto set = [&config](int tile, int rows, int bytes) {
      config.rows[tile] = (uint8_t)rows, config.row_bytes[tile] = (uint16_t)(rows ? bytes : 0);
    };
    set(0, rows0, 64), set(1, rows0, 64), set(4, rows0, k_bytes_);
    set(2, rows1, 64), set(3, rows1, 64), set(5, rows1, k_bytes_);
    set(6, k_bytes_ / 4, 64), set(7, k_bytes_ / 4, 64);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }

  template <int t>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  template <int t>
  void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  // C += A B: int32 += s8 x u8, four per lane.
  template <int c, int a, int b>
  void dot_s8_u8() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
  // C += A B: fp32 += bf16 x bf16, two per lane.
  template <int c, int a, int b>
  void dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }

 private:
  // Linux grants tiles to a process on request (asm/prctl.h: ARCH_REQ_XCOMP_PERM; XTILEDATA is feature 18). The runtime makes
  // the request before it chooses these kernels and reports a refusal; this one only makes the kernels safe to call directly.
  static void ask_permission() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    if (granted) return;
    fputs("deepseek-optimizer: the system refused the AMX tile registers\n", stderr);
    abort();
  }

  int k_bytes_;
};

}  // namespace
}  // namespace dso::DSO_ISA_NAMESPACE
