#include <pthread.h>

#include "../threads.hpp"

namespace dso {

// The class of service keeps the thread on the performance cores while they are free: an efficiency core, at a third of the
// speed, would hold each stage back.
void become_worker(const char* name) {
  pthread_setname_np(name);
  pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);
}

}  // namespace dso
