// Reads of mapped memory whose file no longer has it (POSIX: SIGBUS with BUS_ADRERR), in whichever thread they happen.
#pragma once

namespace dso {

// Makes the memory at an address readable, so that the read continues; false if the address is not its concern. Runs in a
// signal handler: it must not lock or allocate.
using Repair = bool (*)(void* address);

// Installs the handler, if it is not the current one: another library may have replaced it since. All other faults go to the
// handler that was installed before. Calls must not overlap.
void handle_faults(Repair repair);

}  // namespace dso
