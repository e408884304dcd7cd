#include "../read_memory.hpp"

namespace dso {
namespace {

typedef int64_t Bytes16 __attribute__((vector_size(16)));

int64_t read_neon(const uint8_t* begin, const uint8_t* end) { return read_memory<Bytes16>(begin, end); }

}  // namespace

ReadMemory widest_reads() { return read_neon; }

}  // namespace dso
