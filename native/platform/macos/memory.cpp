#include "../memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "../posix/grow_file.hpp"

namespace dso {

int grow_file(int fd, int64_t offset, int64_t bytes) {
  struct stat now;
  if (fstat(fd, &now) != 0) return errno;
  const int64_t missing = offset + bytes - int64_t(now.st_size);
  if (missing <= 0) return 0;
  fstore_t storage = {F_ALLOCATEALL, F_PEOFPOSMODE, 0, missing, 0};
  if (fcntl(fd, F_PREALLOCATE, &storage) != 0 && errno == ENOSPC) return ENOSPC;  // shared memory has no storage: not an error
  return ftruncate(fd, offset + bytes) == 0 ? 0 : errno;
}

// MADV_DONTNEED keeps the content here: new pages take the place of the old ones.
bool discard_memory(void* begin, int64_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  return map_zeros(at, at + uintptr_t(bytes));
}

}  // namespace dso
