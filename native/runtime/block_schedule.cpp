#include "block_schedule.hpp"

#include <algorithm>

namespace dso {
namespace {
constexpr int64_t kFillRows = 64;             // rows of a task that estimates nothing
constexpr int64_t kRows = 8;                  // of a task that does,
constexpr int64_t kEstimates = 1 << 16;       // unless its estimates are more than so many
}  // namespace

void BlockSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  panels.clear();
  runs.clear();
  estimates = candidates = 0;
  const dso_batch& b = *run.batch.source;
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t all = std::clamp<int64_t>(shape.top_k * DSO_BLOCK_TOKENS - b.context_len[s], 0, b.query_len[s]);  // rows that see no more
    add_all_seen(s, all);
    if (all < b.query_len[s]) add_chosen(run, s, all);
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const BlockTask& a, const BlockTask& b) { return a.cost > b.cost; });
  built_ = run.batch.serial;
}

void BlockSchedule::add_all_seen(int64_t sequence, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kFillRows) tasks.push_back({sequence, r, std::min(r + kFillRows, rows), -1, 0, 0, 0, 0, 0});
}

void BlockSchedule::add_chosen(const Run& run, int64_t sequence, int64_t first_row) {
  const dso_batch& b = *run.batch.source;
  const int64_t context = b.context_len[sequence], end = shape.end(context + b.query_len[sequence] - 1);
  const int64_t first_panel = int64_t(panels.size()), first_run = int64_t(runs.size());
  find_blocks(run.batch.table(sequence), end);
  const int64_t width = (int64_t(panels.size()) - first_panel) * summary_blocks;
  const int64_t step = std::clamp<int64_t>(kEstimates / (width * shape.group()), 1, kRows);
  for (int64_t r = first_row; r < b.query_len[sequence]; r += step) {
    const int64_t r1 = std::min<int64_t>(r + step, b.query_len[sequence]);
    for (int64_t h = 0; h < shape.kv_heads; ++h)
      tasks.push_back({sequence, r, r1, h, first_panel, int64_t(panels.size()), first_run, int64_t(runs.size()), (r1 - r) * width});
  }
  estimates = std::max(estimates, step * shape.group() * width);
  candidates = std::max(candidates, end - shape.first());
}

// Panels and runs of blocks [first, end): a panel is read once, however its blocks are strewn over the sequence.
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
    if (int64_t(runs.size()) > first_run && runs.back().at + runs.back().count == at) ++runs.back().count;
    else runs.push_back({i, 1, at});
  }
}

}  // namespace dso
