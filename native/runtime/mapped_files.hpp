// Mapped files whose content may disappear while it is read.
//
// A page that the file no longer has (it was truncated) or that the disk fails to read raises SIGBUS in whichever thread reads
// it: one of the pool, one of torch's, the interpreter's. Unwinding out of it is not safe anywhere, so the handler does not: it
// maps zero pages over the whole mapping, marks it as lost and returns. The read continues, over zeros, and its caller calls
// `check_intact` before results leave the library. Overwritten content raises no signal; it is detected by the file's size and
// modification time, which the same call checks.
//
// The handler is installed with the first mapping, never at load, and checked at every run: a handler that another library
// installs later is called for all faults outside of registered mappings, as is the handler installed before.
#pragma once
#include <cstdint>

namespace dso {

// Returns the mapping's number, for `remove_mapping`.
//  bytes, modified_ns: size and modification time of the file when it was opened
//  fd: file descriptor, duplicated; -1: none, and only faults are detected
//  name: for messages
int64_t add_mapping(const void* address, int64_t bytes, int fd, int64_t modified_ns, const char* name);
void remove_mapping(int64_t number);  // must be called before the memory is unmapped

// Start of the mapping that contains this address; nullptr: none does.
const void* mapping_of(const void* address);

// Throws DSO_EFILE if the file of the mapping that contains this address has changed; does nothing if there is none.
void check_intact(const void* address);

// Reinstalls the handler if another one has replaced it. Does nothing if there are no mappings.
void keep_handler();

}  // namespace dso
