#include "../memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>

#include "../posix/grow_file.hpp"

namespace dso {

int grow_file(int fd, int64_t offset, int64_t bytes) { return posix_fallocate(fd, offset, bytes); }

bool discard_memory(void* begin, int64_t bytes) { return madvise(begin, size_t(bytes), MADV_DONTNEED) == 0; }

}  // namespace dso
