#include "../read_memory.hpp"

#include "../cpu_features.hpp"

namespace dso {
namespace {

typedef int64_t Bytes32 __attribute__((vector_size(32)));
typedef int64_t Bytes64 __attribute__((vector_size(64)));

[[gnu::target("avx512f")]] int64_t read_avx512(const uint8_t* begin, const uint8_t* end) {
  return read_memory<Bytes64>(begin, end);
}
[[gnu::target("avx2")]] int64_t read_avx2(const uint8_t* begin, const uint8_t* end) { return read_memory<Bytes32>(begin, end); }

}  // namespace

ReadMemory widest_reads() { return detect_features() & kAvx512f ? read_avx512 : read_avx2; }

}  // namespace dso
