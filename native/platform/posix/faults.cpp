#include "../faults.hpp"

#include <errno.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>

namespace dso {
namespace {

std::atomic<Repair> repair_fault{nullptr};
std::atomic<pthread_t> chaining{};  // the thread in which the previous handler is being called
struct sigaction before;            // the previous handler, called for all other faults

void call_default(int signal, bool fault) {
  struct sigaction standard = {};
  standard.sa_handler = SIG_DFL;
  sigaction(signal, &standard, nullptr);
  if (!fault) raise(signal);  // a fault repeats by itself
}

void call_before(int signal, siginfo_t* info, void* context) {
  const bool fault = info->si_code > 0;
  const pthread_t thread = pthread_self();
  // Python's faulthandler, after writing, restores the handler it replaced and raises the signal again: if that is this one,
  // stop.
  if (!fault && chaining.load() == thread) return call_default(signal, fault);
  if (!(before.sa_flags & SA_SIGINFO)) {
    if (before.sa_handler == SIG_IGN && !fault) return;
    if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) return call_default(signal, fault);
  }
  chaining.store(thread);
  if (before.sa_flags & SA_SIGINFO)
    before.sa_sigaction(signal, info, context);
  else
    before.sa_handler(signal);
  chaining.store(pthread_t{});
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  if (info->si_code != BUS_ADRERR || !repair_fault.load()(info->si_addr)) call_before(signal, info, context);
  errno = error;
}

}  // namespace

void handle_faults(Repair repair) {
  repair_fault.store(repair);
  struct sigaction now = {};
  if (sigaction(SIGBUS, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) return;
  struct sigaction ours = {};
  ours.sa_sigaction = on_sigbus;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART |
                  SA_NODEFER;  // so that a signal raised by a handler within ours is delivered within ours
  sigemptyset(&ours.sa_mask);
  before = now;
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace dso
