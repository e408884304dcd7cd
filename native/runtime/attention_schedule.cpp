#include "attention_schedule.hpp"

#include <algorithm>

#include "cache.hpp"

namespace dso {
namespace {
constexpr int64_t kDecodeRows = 8;           // rows that share a read of the cache
constexpr int64_t kPrivateFloats = 1 << 18;  // partial results that a thread keeps in its own scratch, if possible
}  // namespace

AttentionKind AttentionSchedule::kind_of(const Run& run, int64_t sequence) const {
  if (shape.eager) return AttentionKind::kEager;
  return run.batch.source->phase[sequence] == DSO_PHASE_DECODE ? AttentionKind::kDecode : AttentionKind::kPrefill;
}

int64_t AttentionSchedule::first_token(int64_t context, int64_t row) const {
  if (shape.window == 0) return 0;
  const int64_t begin = sight_.begin(context + row);
  return begin > shape.sinks ? begin : 0;
}

int64_t AttentionSchedule::tokens(int64_t context, int64_t r0, int64_t r1) const {
  if (shape.top_k > 0) return std::min(context + r1, shape.top_k * DSO_BLOCK_TOKENS);
  const int64_t first = first_token(context, r0);
  return sight_.end(context, r1 - 1) - first + (first > 0 ? shape.sinks : 0);
}

RowChunks AttentionSchedule::chunks(int64_t context, int64_t r0, int64_t r1) const {
  if (shape.top_k > 0) return {0, 0, ceil_div(tokens(context, r0, r1), attn_chunk)};
  const int64_t first = first_token(context, r0) / attn_chunk, sinks = std::min(first, ceil_div(shape.sinks, attn_chunk));
  const int64_t end = ceil_div(sight_.end(context, r1 - 1), attn_chunk);
  if (newest_ == 0) return {sinks, first, sinks + end - first};
  const int64_t older = sinks + ceil_div(first_copied(context, r1 - 1), attn_chunk) - first,
                copy = first_copied(context, r0) / attn_chunk;
  return {sinks, first, older + end - copy, end - copy, copy};
}

int64_t AttentionSchedule::first_copied(int64_t context, int64_t row) const {
  const int64_t begin = shape.window > 0 ? sight_.begin(context + row) : 0;
  return std::max<int64_t>({0, begin, sight_.end(context, row) - newest_});
}

int64_t AttentionSchedule::rows_of_a_block(AttentionKind kind, int64_t chunks) const {
  if (kind != AttentionKind::kDecode) return attn_rows;
  if (shape.top_k > 0) return 1;  // each row attends to its own blocks
  return std::clamp<int64_t>(kPrivateFloats / (chunks * shape.group() * shape.part_floats()), 1, kDecodeRows);
}

void AttentionSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  shared_floats = private_floats = 0;
  const dso_batch& b = *run.batch.source;
  newest_ = b.cache->newest;
  split_ = run.places.split() && shape.kv_heads >= run.places.nodes_count();
  auto chunks_of = [&](int64_t s) {
    sight_ = shape.sight(run.batch, s);
    return chunks(b.context_len[s], 0, b.query_len[s]).count;
  };
  int64_t total = 0, blocks = 0;
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t n = b.query_len[s], middle = (n - 1) / 2;
    sight_ = shape.sight(run.batch, s);
    total += n * tokens(b.context_len[s], middle, middle + 1) * shape.heads;
    blocks += ceil_div(n, rows_of_a_block(kind_of(run, s), chunks_of(s)));
  }
  // One countdown per block of rows, and one per set of heads within it.
  countdowns_.reset(size_t(blocks * (1 + shape.heads)));
  for (int64_t s = 0; s < b.S; ++s) {
    const AttentionKind kind = kind_of(run, s);
    const int64_t step = rows_of_a_block(kind, chunks_of(s));  // which sets what the sequence's rows see
    for (int64_t r = 0; r < b.query_len[s]; r += step)
      add_rows(run, kind, s, r, std::min<int64_t>(r + step, b.query_len[s]), std::max<int64_t>(1, total / run.threads));
  }
  const auto node_of = [&](const AttentionTask& t) {
    int i = 0;
    while (split_ && run.places.of_node(i, shape.kv_heads).end <= t.kv_head) ++i;
    return i;
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const AttentionTask& a, const AttentionTask& b) {
    const int i = node_of(a), j = node_of(b);
    return i != j ? i < j : a.cost > b.cost;
  });
  nodes.clear();
  for (int i = 0; i < run.places.nodes_count(); ++i)
    nodes.add(split_ ? std::partition_point(tasks.begin(), tasks.end(), [&](const auto& t) { return node_of(t) <= i; }) -
                           tasks.begin()
                     : 0);
  built_ = run.batch.serial;
}

void AttentionSchedule::add_rows(const Run& run, AttentionKind kind, int64_t s, int64_t r0, int64_t r1, int64_t fair) {
  const int64_t context = run.batch.source->context_len[s], group = shape.group(), rows = r1 - r0;
  const RowChunks chunks = this->chunks(context, r0, r1);

  // Split along the cache first, which costs nothing extra per task; then by heads, which makes each task read the cache again.
  int64_t pieces = 1, cost = rows * tokens(context, r0, r1) * group;
  if (kind == AttentionKind::kDecode) pieces = std::clamp<int64_t>(ceil_div(4 * cost, fair), 1, chunks.count);
  const int64_t span = ceil_div(chunks.count, pieces);
  pieces = ceil_div(chunks.count, span);
  const int64_t parts = std::clamp<int64_t>(ceil_div(2 * cost / pieces, fair), 1, group);
  cost /= pieces * parts;

  if (kind == AttentionKind::kEager) private_floats = std::max(private_floats, round_up(sight_.end(context, r1 - 1), 16));
  const int32_t rows_left = shape.converts ? countdowns_.add() : -1;
  // If there are enough tasks without splitting heads, one thread processes all heads: they are adjacent in a block.
  const bool together = kind == AttentionKind::kDecode && pieces * parts == 1 && 4 * cost * shape.kv_heads <= fair;
  const auto end_of = [&](int64_t head) {  // of the heads that one task processes together, all of one node
    if (!together) return head + 1;
    int i = 0;
    while (split_ && run.places.of_node(i, shape.kv_heads).end <= head) ++i;
    return split_ ? run.places.of_node(i, shape.kv_heads).end : shape.kv_heads;
  };
  for (int64_t h = 0, next; h < shape.kv_heads; h = next) {
    next = end_of(h);
    for (int64_t p = 0; p < parts; ++p) {
      AttentionTask t{};
      t.kind = kind;
      t.sequence = s;
      t.kv_head = h;
      t.kv_end = next;
      t.h0 = p * group / parts;
      t.h1 = (p + 1) * group / parts;
      t.r0 = r0;
      t.r1 = r1;
      t.chunks = chunks;
      t.part = t.merge = -1;
      t.rows = rows_left;
      t.cost = cost * (next - h);
      if (rows_left >= 0) countdowns_.expect(rows_left, 1);
      const int64_t floats = chunks.count * rows * (t.h1 - t.h0) * shape.part_floats();
      if (pieces > 1) {
        t.part = shared_floats;
        shared_floats += floats;
        t.merge = countdowns_.add(int32_t(pieces));
      } else if (kind == AttentionKind::kDecode) {
        private_floats = std::max(private_floats, floats);
      }
      for (int64_t c = 0; c < chunks.count; c += span) {
        t.c0 = c;
        t.c1 = std::min(chunks.count, c + span);
        tasks.push_back(t);
        if (kind != AttentionKind::kDecode) break;  // the task walks all chunks itself
      }
    }
  }
}

}  // namespace dso
