#include "arena.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, size)
#define ASAN_UNPOISON_MEMORY_REGION(data, size)
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.hpp"
#include "layout.hpp"
#include "memory.hpp"

namespace dso {

int64_t bytes_of_parts(const char* what, const char* parts, int64_t count, int64_t part_bytes) {
  int64_t bytes;
  if (count < 1 || count > INT32_MAX)
    fail(DSO_EINVAL, "%s: %lld %s, must be from 1 to INT32_MAX", what, (long long)count, parts);
  if (__builtin_mul_overflow(count, part_bytes, &bytes))
    fail(DSO_ENOMEM, "%s: %lld %s exceed the address space", what, (long long)count, parts);
  return bytes;
}

Arena::Arena(int64_t bytes) {
  if (bytes <= 0) return;
  const int64_t size = round_up(bytes, bytes >= kHugePage ? kHugePage : page_bytes());
  void* const p = map_memory(size);
  if (!p) fail(DSO_ENOMEM, "%lld bytes of memory could not be allocated: %s", (long long)size, std::strerror(errno));
  data_ = static_cast<uint8_t*>(p);
  size_ = size;
  ASAN_POISON_MEMORY_REGION(data_ + bytes, size_ - bytes);
}

Arena::~Arena() {
  ASAN_UNPOISON_MEMORY_REGION(data_, size_);  // for the next owner of these addresses
  if (data_) unmap_memory(data_, size_);
}

void Arena::close() {
  ASAN_UNPOISON_MEMORY_REGION(data_, size_);
  if (kGap > 0) std::memset(data_, 0xff, size_);
  ASAN_POISON_MEMORY_REGION(data_, size_);
}

void Arena::allow([[maybe_unused]] int64_t from, [[maybe_unused]] int64_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data_ + from, bytes);
}

void Arena::reserve(int64_t bytes) {
  if (bytes <= size_) {
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes);  // of whole pages; the previous reservation may have been smaller
    return;
  }
  const int64_t grown = std::max(bytes, size_ + size_ / 4);
  *this = Arena();  // free the old memory first
  *this = Arena(grown);
}

void Arena::release(int64_t from) {
  const int64_t begin = round_up(from, page_bytes());
  if (begin >= size_) return;
  if (!discard_memory(data_ + begin, size_ - begin))
    fail(DSO_ENOMEM, "memory could not be returned to the system: %s", std::strerror(errno));
}

}  // namespace dso
