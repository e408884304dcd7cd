#include <pthread.h>

#include "../threads.hpp"

namespace dso {

void become_worker(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace dso
