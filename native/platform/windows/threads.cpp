#include "../threads.hpp"

// clang-format off: tlhelp32.h needs windows.h
#include <windows.h>
#include <tlhelp32.h>
// clang-format on

#include <string>

namespace dso {
namespace {

DWORD parent_number() {
  const HANDLE list = CreateToolhelp32Snapshot(TH32CS_SNAPPROCESS, 0);
  if (list == INVALID_HANDLE_VALUE) return 0;
  PROCESSENTRY32W entry = {};
  entry.dwSize = sizeof entry;
  DWORD parent = 0;
  for (BOOL more = Process32FirstW(list, &entry); more && !parent; more = Process32NextW(list, &entry))
    if (entry.th32ProcessID == GetCurrentProcessId()) parent = entry.th32ParentProcessID;
  CloseHandle(list);
  return parent;
}

}  // namespace

void become_worker(const char* name) {
  SetThreadDescription(GetCurrentThread(), std::wstring(name, name + std::char_traits<char>::length(name)).c_str());
}

// There are no signals that a thread could be chosen for, and no forks.
SignalsBlocked::SignalsBlocked() : before_{} {}
SignalsBlocked::~SignalsBlocked() {}
void at_fork(void (*)(), void (*)(), void (*)()) {}

int64_t process_number() { return int64_t(GetCurrentProcessId()); }

// The number stays when the parent has ended, and another process may get it: an open handle tells.
int64_t parent_process() {
  static const DWORD number = parent_number();
  static const HANDLE parent = OpenProcess(SYNCHRONIZE, FALSE, number);
  return parent && WaitForSingleObject(parent, 0) == WAIT_TIMEOUT ? int64_t(number) : 0;
}

}  // namespace dso
