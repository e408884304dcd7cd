#include "../memory.hpp"

#include <io.h>
#include <windows.h>

#include <cerrno>

namespace dso {

// The granularity of addresses and of offsets in mapped files, a multiple of the size of a page.
int64_t page_bytes() {
  static const int64_t bytes = [] {
    SYSTEM_INFO system;
    GetSystemInfo(&system);
    return int64_t(system.dwAllocationGranularity);
  }();
  return bytes;
}

// In pages of the usual size: huge ones need a privilege that users do not have, and cannot be returned one by one.
void* map_memory(int64_t bytes) {
  void* const p = VirtualAlloc(nullptr, SIZE_T(bytes), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (!p) errno = ENOMEM;
  return p;
}

void unmap_memory(void* begin, int64_t) {
  MEMORY_BASIC_INFORMATION region;
  if (VirtualQuery(begin, &region, sizeof region) && region.Type == MEM_MAPPED)
    UnmapViewOfFile(begin);
  else
    VirtualFree(begin, 0, MEM_RELEASE);
}

// The mapping grows the file, and the view keeps the mapping.
void* map_shared_file(int fd, int64_t offset, int64_t bytes) {
  const HANDLE file = reinterpret_cast<HANDLE>(_get_osfhandle(fd));
  LARGE_INTEGER now;
  if (!GetFileSizeEx(file, &now)) {
    errno = EBADF;
    return nullptr;
  }
  const uint64_t size = uint64_t(now.QuadPart > offset + bytes ? now.QuadPart : offset + bytes);
  const HANDLE mapping = CreateFileMappingW(file, nullptr, PAGE_READWRITE, DWORD(size >> 32), DWORD(size), nullptr);
  void* const p = mapping
                      ? MapViewOfFile(mapping, FILE_MAP_ALL_ACCESS, DWORD(uint64_t(offset) >> 32), DWORD(offset), SIZE_T(bytes))
                      : nullptr;
  if (!p) errno = ENOMEM;
  if (mapping) CloseHandle(mapping);
  return p;
}

bool discard_memory(void* begin, int64_t bytes) {
  if (VirtualFree(begin, SIZE_T(bytes), MEM_DECOMMIT) && VirtualAlloc(begin, SIZE_T(bytes), MEM_COMMIT, PAGE_READWRITE))
    return true;
  errno = ENOMEM;
  return false;
}

bool map_zeros(uintptr_t, uintptr_t) { return false; }  // faults.cpp never asks for it

}  // namespace dso
