#include "block_schedule.hpp"

#include <algorithm>

namespace dso {
namespace {
constexpr int64_t kFillRows = 64;        // rows of a task without estimates
constexpr int64_t kRows = 8;             // rows of a task with estimates,
constexpr int64_t kEstimates = 1 << 16;  // unless these are more than this many
}  // namespace

int64_t BlockSchedule::rows_that_see_all(const dso_batch& b, int64_t sequence) const {
  return std::clamp<int64_t>(shape.top_k * DSO_BLOCK_TOKENS - b.context_len[sequence], 0, b.query_len[sequence]);
}

int64_t BlockSchedule::rows_of_a_task(int64_t width) const {
  return std::clamp<int64_t>(kEstimates / (width * shape.group()), 1, kRows);
}

void BlockSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  panels.clear();
  runs.clear();
  shared_floats = private_floats = candidates = 0;
  const dso_batch& b = *run.batch.source;
  int64_t total = 0, most = 0;  // blocks x rows to be estimated, per kv head; number of one-row tasks
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t rows = b.query_len[s] - rows_that_see_all(b, s);
    total += rows * (shape.end(b.context_len[s] + b.query_len[s] - 1) - shape.first());
    most += rows * shape.kv_heads;
  }
  countdowns.reset(size_t(most));
  const int64_t fair = std::max<int64_t>(1, total * shape.kv_heads / run.threads);
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t all = rows_that_see_all(b, s);
    add_all_seen(s, all);
    if (all < b.query_len[s]) add_chosen(run, s, all, fair);
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const BlockTask& a, const BlockTask& b) { return a.cost > b.cost; });
  built_ = run.batch.serial;
}

void BlockSchedule::add_all_seen(int64_t sequence, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kFillRows)
    tasks.push_back({sequence, r, std::min(r + kFillRows, rows), -1, 0, 0, 0, 0, 0, 0, -1, -1, 0});
}

void BlockSchedule::add_chosen(const Run& run, int64_t sequence, int64_t first_row, int64_t fair) {
  const dso_batch& b = *run.batch.source;
  const int64_t context = b.context_len[sequence], end = shape.end(context + b.query_len[sequence] - 1);
  BlockTask t{};
  t.sequence = sequence;
  t.first = int64_t(panels.size());
  t.b0 = int64_t(runs.size());
  find_blocks(run.batch.table(0, sequence), end);  // a cache with summaries has one group
  const int64_t last = int64_t(panels.size()), count = last - t.first;
  t.b1 = int64_t(runs.size());
  t.width = count * summary_blocks;
  const int64_t step = rows_of_a_task(t.width);
  for (t.r0 = first_row; t.r0 < b.query_len[sequence]; t.r0 = t.r1) {
    t.r1 = std::min<int64_t>(t.r0 + step, b.query_len[sequence]);
    const int64_t floats = (t.r1 - t.r0) * shape.group() * t.width, cost = (t.r1 - t.r0) * t.width;
    const int64_t span = ceil_div(count, std::clamp<int64_t>(ceil_div(4 * cost, fair), 1, count));
    for (t.kv_head = 0; t.kv_head < shape.kv_heads; ++t.kv_head) {
      t.part = t.merge = -1;
      if (span < count) {
        t.part = shared_floats;
        shared_floats += floats;
        t.merge = countdowns.add(int32_t(ceil_div(count, span)));
      } else {
        private_floats = std::max(private_floats, floats);
      }
      for (t.p0 = t.first; t.p0 < last; t.p0 = t.p1) {
        t.p1 = std::min(t.p0 + span, last);
        t.cost = cost * (t.p1 - t.p0) / count;
        tasks.push_back(t);
      }
    }
  }
  candidates = std::max(candidates, end - shape.first());
}

// Panels and runs of blocks [first, end): each panel is read once, however its blocks are scattered over the sequence.
void BlockSchedule::find_blocks(const int32_t* table, int64_t end) {
  const int64_t begin = shape.first(), first_panel = int64_t(panels.size()), first_run = int64_t(runs.size());
  for (int64_t i = begin; i < end; ++i)
    if (i == begin || table[i] / summary_blocks != panels.back()) panels.push_back(int32_t(table[i] / summary_blocks));
  std::sort(panels.begin() + first_panel, panels.end());
  panels.erase(std::unique(panels.begin() + first_panel, panels.end()), panels.end());
  int64_t panel = -1, place = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (table[i] / summary_blocks != panel) {
      panel = table[i] / summary_blocks;
      place = std::lower_bound(panels.begin() + first_panel, panels.end(), panel) - panels.begin() - first_panel;
    }
    const int64_t at = place * summary_blocks + table[i] % summary_blocks;
    if (int64_t(runs.size()) > first_run && runs.back().at + runs.back().count == at)
      ++runs.back().count;
    else
      runs.push_back({i, 1, at});
  }
}

}  // namespace dso
