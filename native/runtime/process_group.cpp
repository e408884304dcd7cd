#include "process_group.hpp"

#include "error.hpp"

namespace dso {

ProcessGroup::ProcessGroup(int32_t rank, int32_t ranks) : rank_(rank), ranks_(ranks) {
  if (ranks < 1 || ranks > kMostRanks || rank < 0 || rank >= ranks)
    fail(DSO_EINVAL, "rank is %d of %d, must be below, and there are at most %d", rank, ranks, kMostRanks);
}

void ProcessGroup::check_rank(int32_t rank) const {
  if (rank < 0 || rank >= ranks_) fail(DSO_EINVAL, "rank is %d, must be below %d", rank, ranks_);
}

void ProcessGroup::check_alive() const {
  if (lost() >= 0) fail(DSO_ELOST, "rank %d of %d", lost(), ranks_);
}

}  // namespace dso
