#include "attention_schedule.hpp"

#include <algorithm>

namespace dso {
namespace {
constexpr int64_t kDecodeRows = 8;          // rows that share a read of the cache
constexpr int64_t kPrivateFloats = 1 << 18;  // partial results a thread keeps at hand, where it can choose
}  // namespace

AttentionKind AttentionSchedule::kind_of(const Run& run, int64_t sequence) const {
  if (shape.eager) return AttentionKind::kEager;
  return run.batch.source->phase[sequence] == DSO_PHASE_DECODE ? AttentionKind::kDecode : AttentionKind::kPrefill;
}

int64_t AttentionSchedule::first_token(int64_t context, int64_t row) const {
  return shape.window > 0 ? std::max<int64_t>(0, context + row + 1 - shape.window) : 0;
}

int64_t AttentionSchedule::rows_of_a_block(AttentionKind kind, int64_t chunks) const {
  if (kind != AttentionKind::kDecode) return attn_rows;
  return std::clamp<int64_t>(kPrivateFloats / (chunks * shape.group() * shape.part_floats()), 1, kDecodeRows);
}

void AttentionSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  shared_floats = private_floats = 0;
  const dso_batch& b = *run.batch.source;
  auto chunks_of = [&](int64_t s) { return ceil_div(int64_t(b.context_len[s]) + b.query_len[s], attn_chunk); };
  int64_t total = 0, blocks = 0;
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t n = b.query_len[s], seen = b.context_len[s] + (n + 1) / 2 - first_token(b.context_len[s], n / 2);
    total += n * std::max<int64_t>(1, seen) * shape.heads;
    blocks += ceil_div(n, rows_of_a_block(kind_of(run, s), chunks_of(s)));
  }
  // A countdown for each block of rows, and one for each set of heads of it.
  countdowns_.reset(size_t(blocks * (1 + shape.heads)));
  for (int64_t s = 0; s < b.S; ++s) {
    const AttentionKind kind = kind_of(run, s);
    const int64_t step = rows_of_a_block(kind, chunks_of(s));
    for (int64_t r = 0; r < b.query_len[s]; r += step)
      add_rows(run, kind, s, r, std::min<int64_t>(r + step, b.query_len[s]), std::max<int64_t>(1, total / run.threads));
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
  built_ = run.batch.serial;
}

void AttentionSchedule::add_rows(const Run& run, AttentionKind kind, int64_t s, int64_t r0, int64_t r1, int64_t fair) {
  const int64_t context = run.batch.source->context_len[s], group = shape.group(), rows = r1 - r0;
  const int64_t first = first_token(context, r0), tokens = context + r1 - first;
  const int64_t first_chunk = first / attn_chunk, chunks = ceil_div(context + r1, attn_chunk) - first_chunk;

  // First along the cache, where a task costs nothing more by it; then by heads, which makes each task read the cache again.
  int64_t pieces = 1, cost = rows * tokens * group;
  if (kind == AttentionKind::kDecode) pieces = std::clamp<int64_t>(ceil_div(4 * cost, fair), 1, chunks);
  const int64_t span = ceil_div(chunks, pieces);
  pieces = ceil_div(chunks, span);
  const int64_t parts = std::clamp<int64_t>(ceil_div(2 * cost / pieces, fair), 1, group);
  cost /= pieces * parts;

  if (kind == AttentionKind::kEager) private_floats = std::max(private_floats, round_up(context + r1, 16));
  const int32_t rows_left = shape.converts ? countdowns_.add() : -1;
  // Where sequences alone are tasks enough, one thread reads all heads: they lie side by side in a block.
  const bool together = kind == AttentionKind::kDecode && pieces * parts == 1 && 4 * cost * shape.kv_heads <= fair;
  const int64_t heads_step = together ? shape.kv_heads : 1;
  for (int64_t h = 0; h < shape.kv_heads; h += heads_step) {
    for (int64_t p = 0; p < parts; ++p) {
      AttentionTask t{};
      t.kind = kind;
      t.sequence = s;
      t.kv_head = h;
      t.kv_end = h + heads_step;
      t.h0 = p * group / parts;
      t.h1 = (p + 1) * group / parts;
      t.r0 = r0;
      t.r1 = r1;
      t.first_chunk = first_chunk;
      t.chunks = chunks;
      t.part = t.merge = -1;
      t.rows = rows_left;
      t.cost = cost * heads_step;
      if (rows_left >= 0) countdowns_.expect(rows_left, 1);
      const int64_t floats = chunks * rows * (t.h1 - t.h0) * shape.part_floats();
      if (pieces > 1) {
        t.part = shared_floats;
        shared_floats += floats;
        t.merge = countdowns_.add(int32_t(pieces));
      } else if (kind == AttentionKind::kDecode) {
        private_floats = std::max(private_floats, floats);
      }
      for (int64_t c = 0; c < chunks; c += span) {
        t.c0 = first_chunk + c;
        t.c1 = first_chunk + std::min(chunks, c + span);
        tasks.push_back(t);
        if (kind != AttentionKind::kDecode) break;  // it walks all chunks by itself
      }
    }
  }
}

}  // namespace dso
