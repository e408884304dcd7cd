#include "../files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace dso {

int duplicate_file(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, 3); }
void close_file(int fd) { close(fd); }

bool state_of_file(int fd, FileState& state) {
  struct stat s;
  if (fstat(fd, &s) != 0) return false;
#ifdef __APPLE__
  const timespec modified = s.st_mtimespec;
#else
  const timespec modified = s.st_mtim;
#endif
  state = {int64_t(s.st_size), int64_t(modified.tv_sec) * 1000000000 + modified.tv_nsec};
  return true;
}

}  // namespace dso
