// Time of work on one thread in seconds, best of several runs.
#pragma once
#include <time.h>

#include <algorithm>

inline double seconds() {  // CPU time of this thread: others may occupy the core
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

template <class Work>
double best(Work work) {
  double least = 1e9, spent = 0;
  do {
    const double start = seconds();
    work();
    const double t = seconds() - start;
    least = std::min(least, t);
    spent += t;
  } while (spent < 0.3);
  return least;
}
