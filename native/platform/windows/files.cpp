#include "../files.hpp"

#include <io.h>
#include <windows.h>

namespace dso {
namespace {

constexpr int64_t kUnixEpoch = 116444736000000000;  // in ticks of 100 ns since 1601

}  // namespace

int duplicate_file(int fd) {
  const int copy = _dup(fd);
  if (copy >= 0) SetHandleInformation(reinterpret_cast<HANDLE>(_get_osfhandle(copy)), HANDLE_FLAG_INHERIT, 0);
  return copy;
}
void close_file(int fd) { _close(fd); }

bool state_of_file(int fd, FileState& state) {
  BY_HANDLE_FILE_INFORMATION file;
  if (!GetFileInformationByHandle(reinterpret_cast<HANDLE>(_get_osfhandle(fd)), &file)) return false;
  const int64_t ticks = int64_t(uint64_t(file.ftLastWriteTime.dwHighDateTime) << 32 | file.ftLastWriteTime.dwLowDateTime);
  state = {int64_t(uint64_t(file.nFileSizeHigh) << 32 | file.nFileSizeLow), (ticks - kUnixEpoch) * 100};
  return true;
}

}  // namespace dso
