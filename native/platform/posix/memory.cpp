#include "../memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "grow_file.hpp"

namespace dso {

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

void* map_memory(int64_t bytes) {
  void* const p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(p, size_t(bytes), MADV_HUGEPAGE);  // only a hint: the memory works without it
#endif
  return p;
}

void unmap_memory(void* begin, int64_t bytes) { munmap(begin, size_t(bytes)); }

void* map_shared_file(int fd, int64_t offset, int64_t bytes) {
  if (const int code = grow_file(fd, offset, bytes); code != 0) {
    errno = code;
    return nullptr;
  }
  void* const p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
  return p == MAP_FAILED ? nullptr : p;
}

bool map_zeros(uintptr_t begin, uintptr_t end) {
  return mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

}  // namespace dso
