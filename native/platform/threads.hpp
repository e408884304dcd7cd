// Threads, signals and processes, that the standard library lacks.
#pragma once
#include <cstdint>

namespace dso {

// This thread will compute a part of what callers wait for. name: for debuggers, at most 15 characters.
void become_worker(const char* name);

// Threads started meanwhile leave signals to the host program's own threads, except for those that their own instructions may
// cause: if these are blocked, the process ends without its handlers being called (faults.hpp, faulthandler).
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  alignas(16) unsigned char before_[128];  // the system's set of signals
};

int64_t process_number();  // differs in a forked child
int64_t parent_process();  // the process number of the parent; another one after the parent has ended
// Called around every fork from now on: before it, then in the parent, and in the child.
void at_fork(void (*before)(), void (*parent)(), void (*child)());

}  // namespace dso
