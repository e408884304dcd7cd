#include "../threads.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <initializer_list>
#include <new>

namespace dso {

SignalsBlocked::SignalsBlocked() {
  static_assert(sizeof(sigset_t) <= sizeof before_);
  sigset_t all;
  sigfillset(&all);
  for (int fault : {SIGBUS, SIGSEGV, SIGILL, SIGFPE}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, new (before_) sigset_t);
}
SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, reinterpret_cast<sigset_t*>(before_), nullptr); }

int64_t process_number() { return getpid(); }
int64_t parent_process() { return getppid(); }

void at_fork(void (*before)(), void (*parent)(), void (*child)()) { pthread_atfork(before, parent, child); }

}  // namespace dso
