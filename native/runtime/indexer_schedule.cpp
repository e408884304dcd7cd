#include "indexer_schedule.hpp"

#include <algorithm>

namespace dso {
namespace {
constexpr int64_t kFillRows = 64;  // rows of a task without scores
}

void IndexSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  shared_floats = private_floats = 0;
  const dso_batch& b = *run.batch.source;
  auto all_seen = [&](int64_t s) {  // rows that see no more than top_k keys
    return std::clamp<int64_t>((shape.top_k + 1) * shape.every - 1 - b.context_len[s], 0, b.query_len[s]);
  };
  int64_t total = 0, blocks = 0;
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t first = all_seen(s), rows = b.query_len[s] - first;
    total += rows * (b.context_len[s] + first + (rows + 1) / 2) / shape.every;
    blocks += ceil_div(rows, kRows);
  }
  countdowns_.reset(size_t(blocks));
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t first = all_seen(s), end = b.query_len[s];
    add_all_seen(s, first);
    for (int64_t r = first; r < end; r += kRows)
      add_scored(s, b.context_len[s], r, std::min(r + kRows, end), std::max<int64_t>(1, total / run.threads));
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const IndexTask& a, const IndexTask& b) { return a.cost > b.cost; });
  built_ = run.batch.serial;
}

void IndexSchedule::add_all_seen(int64_t sequence, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kFillRows)
    tasks.push_back({sequence, r, std::min(r + kFillRows, rows), 0, 0, 0, -1, -1, 0});
}

void IndexSchedule::add_scored(int64_t sequence, int64_t context, int64_t r0, int64_t r1, int64_t fair) {
  const int64_t tokens = shape.seen(context, r1 - 1), rows = r1 - r0, cost = rows * tokens;
  const int64_t pieces = std::clamp<int64_t>(ceil_div(4 * cost, fair), 1, ceil_div(tokens, kTokens));
  const int64_t span = round_up(ceil_div(tokens, pieces), kTokens);
  IndexTask t{sequence, r0, r1, 0, tokens, round_up(tokens, 16), -1, -1, cost};
  if (span >= tokens) {
    private_floats = std::max(private_floats, rows * t.stride);
    tasks.push_back(t);
    return;
  }
  t.part = shared_floats;
  shared_floats += rows * t.stride;
  t.merge = countdowns_.add(int32_t(ceil_div(tokens, span)));
  for (int64_t from = 0; from < tokens; from += span) {
    t.t0 = from;
    t.t1 = std::min(from + span, tokens);
    t.cost = rows * (t.t1 - t.t0);
    tasks.push_back(t);
  }
}

}  // namespace dso
