// The ends of processes that a test has started, ranks 1 and higher of a group.
#pragma once
#include <sys/wait.h>

#include <vector>

#include "check.hpp"

inline std::vector<int> ended(const std::vector<pid_t>& pids) {  // waits for them; their statuses
  std::vector<int> statuses;
  for (pid_t pid : pids) {
    int status = 0;
    waitpid(pid, &status, 0);
    statuses.push_back(status);
  }
  return statuses;
}

inline void all_fine(const std::vector<int>& statuses, const char* what) {
  for (size_t i = 0; i < statuses.size(); ++i) check(statuses[i] == 0, "%s: rank %zu ended with %d", what, i + 1, statuses[i]);
}
