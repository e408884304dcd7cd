// Mapped files whose content may go away while it is read.
//
// A page that the file no longer has (it was cut short) or that the disk cannot give raises SIGBUS in whichever thread reads
// it: one of the pool, one of torch's, the interpreter's. Unwinding out of it is not safe anywhere, so the handler does not: it
// puts zero pages in place of the whole mapping, marks it as lost and returns. The read goes on, over zeros, and whoever
// started it asks `check_intact` before its results leave the library. Content that was overwritten raises nothing; there the
// file's size and time of modification tell, which are looked at by the same call.
//
// The handler is installed with the first mapping, never at load, and looked after at every run: whoever installs another one
// later is called for all faults outside of registered mappings, as is whoever was there before.
#pragma once
#include <cstdint>

namespace dso {

// Returns the mapping's number, for `remove_mapping`.
//  bytes: of the file as it was when it was opened; modified_ns: its time of modification then
//  fd: of the file; duplicated. -1: none, and only faults are noticed
//  name: for messages
int64_t add_mapping(const void* address, int64_t bytes, int fd, int64_t modified_ns, const char* name);
void remove_mapping(int64_t number);  // before it is unmapped

// Start of the mapping that holds this address; nullptr: none does.
const void* mapping_of(const void* address);

// Throws DSO_EFILE where the mapping that holds this address is not what was mapped; nothing where none does.
void check_intact(const void* address);

// Puts the handler in place again where another one has taken it. Nothing where there are no mappings.
void keep_handler();

}  // namespace dso
