#include "mla_schedule.hpp"

namespace dso {
namespace {
constexpr int64_t kAbsorbedRows = 8;    // rows that share one pass over the cache
constexpr int64_t kExpandedRows = 512;  // rows that share the keys and values expanded for them
constexpr int64_t kLeastExpandedRows = 64;
// Limits of partial results, in floats (32 MiB): for a block of several rows in its task's scratch, and for all pieces that
// tasks share. Larger work uses whole groups as tasks: per row, ceil(tokens / 8192) groups in the shared memory and the 32
// pieces of one group in a task's scratch. At 160K tokens, 128 heads and rank 512 that is 5.4 MB and at most 8.7 MB per thread;
// all pieces would be 169 MB.
constexpr int64_t kPartFloats = 1 << 23;

// Multiply-adds per head for rows that are tokens [i0, i1) of their sequence.
int64_t absorbed_cost(const MlaShape& s, int64_t i0, int64_t i1) {
  return (i1 - i0) * s.rank * (s.nope + s.v_dim) + s.window.pairs(i0, i1) * (2 * s.rank + s.rope);
}
int64_t sparse_cost(const MlaShape& s, int64_t rows) {
  return rows * (s.rank * (s.nope + s.v_dim) + s.top_k * (2 * s.rank + s.rope));
}
int64_t expanded_cost(const MlaShape& s, int64_t i0, int64_t i1) {
  int64_t made = 0;  // tokens whose keys and values are expanded
  for (int64_t i = i0; i < i1; i += kExpandedRows) made += s.window.pieces(i, std::min(i + kExpandedRows, i1)).tokens();
  return made * s.rank * (s.nope + s.v_dim) + s.window.pairs(i0, i1) * (s.head_dim() + s.v_dim);
}
}  // namespace

bool MlaShape::can_expand() const { return is_head_dim(head_dim()) && is_head_dim(v_dim); }

void MlaSchedule::find_spans(const Run& run) {
  spans_.clear();
  const dso_batch& b = *run.batch.source;
  for (int64_t s = 0; s < b.S; ++s) {
    const int64_t rows = b.query_len[s],
                  dense = shape.top_k > 0 ? std::clamp<int64_t>(shape.top_k - b.context_len[s], 0, rows) : rows;
    if (dense > 0) spans_.push_back({s, 0, dense, false, false});
    if (dense < rows) spans_.push_back({s, dense, rows, true, false});
  }
  for (RowSpan& span : spans_) span.expanded = expands(run, span);
}

bool MlaSchedule::expands(const Run& run, const RowSpan& span) const {
  if (shape.expand) return true;
  const dso_batch& b = *run.batch.source;
  if (span.sparse || b.phase[span.sequence] == DSO_PHASE_DECODE || !shape.can_expand()) return false;
  if (run.batch.adapts_heads[size_t(span.sequence)]) return false;  // its steps change absorbed queries and sums
  const int64_t i0 = b.context_len[span.sequence] + span.r0, i1 = i0 + span.rows();
  return expanded_cost(shape, i0, i1) < absorbed_cost(shape, i0, i1);
}

int64_t MlaSchedule::cost(const Run& run, const RowSpan& span) const {
  const int64_t i0 = run.batch.source->context_len[span.sequence] + span.r0, i1 = i0 + span.rows();
  if (span.sparse) return sparse_cost(shape, span.rows());
  return span.expanded ? expanded_cost(shape, i0, i1) : absorbed_cost(shape, i0, i1);
}

MlaPieces MlaSchedule::pieces(const Run& run, const RowSpan& span, int64_t r0, int64_t r1) const {
  const int64_t context = run.batch.source->context_len[span.sequence];
  return span.sparse ? MlaPieces{0, 0, shape.top_k} : shape.window.pieces(context + r0, context + r1);
}

int64_t MlaSchedule::rows_of_a_block(const Run& run, const RowSpan& span) const {
  if (span.sparse) return 1;
  if (span.expanded) return expanded_rows(run, span.rows());
  const MlaPieces last = pieces(run, span, span.r1 - 1, span.r1);
  return std::clamp<int64_t>(kPartFloats / ((last.in_group() + last.groups()) * shape.heads * shape.part_floats()), 1,
                             kAbsorbedRows);
}

// Fewer rows per task if the heads alone make too few tasks: expanding keys and values again costs less than idle threads.
int64_t MlaSchedule::expanded_rows(const Run& run, int64_t rows) const {
  return std::clamp(round_up(ceil_div(rows * shape.heads, run.threads), kLeastExpandedRows), kLeastExpandedRows, kExpandedRows);
}

void MlaSchedule::add_range(int64_t rows, bool decode, bool expanded) {
  const int64_t begin = ranges.empty() ? 0 : ranges.back().end;
  if (!ranges.empty() && ranges.back().decode == decode && ranges.back().expanded == expanded)
    ranges.back().end += rows;
  else
    ranges.push_back({begin, begin + rows, decode, expanded});
}

void MlaSchedule::build(const Run& run) {
  if (built_ == run.batch.serial) return;
  tasks.clear();
  ranges.clear();
  shared_floats = private_floats = queries = states = 0;
  find_spans(run);
  int64_t total = 0, blocks = 0;
  for (const RowSpan& span : spans_) {
    add_range(span.rows(), run.batch.source->phase[span.sequence] == DSO_PHASE_DECODE, span.expanded);
    total += shape.heads * cost(run, span);
    blocks += ceil_div(span.rows(), rows_of_a_block(run, span));
  }
  room_ = kPartFloats / blocks;
  countdowns.reset(size_t(blocks * ceil_div(shape.heads, mla_heads)));
  const int64_t fair = std::max<int64_t>(1, total / run.threads);
  for (const RowSpan& span : spans_) {
    const int64_t step = rows_of_a_block(run, span);
    for (int64_t r = span.r0; r < span.r1; r += step)
      (this->*(span.expanded ? &MlaSchedule::add_expanded : &MlaSchedule::add_absorbed))(run, span, r,
                                                                                         std::min(r + step, span.r1), fair);
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const MlaTask& x, const MlaTask& y) { return x.cost > y.cost; });
  built_ = run.batch.serial;
}

void MlaSchedule::add_absorbed(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair) {
  MlaTask t{};
  t.sparse = span.sparse;
  t.sequence = span.sequence;
  t.r0 = r0;
  t.r1 = r1;
  t.pieces = pieces(run, span, r0, r1);
  const int64_t rows = r1 - r0, sets = ceil_div(shape.heads, mla_heads),
                floats = rows * shape.part_floats();  // per head and piece
  const bool whole_groups = t.pieces.count() * floats * shape.heads > room_;
  const int64_t units = whole_groups ? t.pieces.groups() : t.pieces.count();  // units that are not split

  // Split along the cache first, which costs nothing extra per task; then by heads, which makes each task read the cache again.
  const int64_t cost = shape.heads * rows * t.pieces.tokens() * (2 * shape.rank + shape.rope);
  const int64_t stretch = ceil_div(units, std::clamp<int64_t>(ceil_div(4 * cost, fair), 1, units)),
                stretches = ceil_div(units, stretch);
  const int64_t parts = std::clamp<int64_t>(ceil_div(2 * cost / stretches, fair), 1, sets);
  t.parts = stretches == 1 ? MlaParts::kAlone : whole_groups ? MlaParts::kGroups : MlaParts::kPieces;
  t.cost = cost / (stretches * parts);
  for (int64_t p = 0; p < parts; ++p) {
    t.h0 = p * sets / parts * mla_heads;
    t.h1 = std::min((p + 1) * sets / parts * mla_heads, shape.heads);
    const int64_t heads = t.h1 - t.h0, several = t.pieces.groups() > 1 ? t.pieces.groups() : 0;  // groups to merge
    if (t.parts != MlaParts::kAlone) {
      t.part = shared_floats;
      shared_floats += units * floats * heads;
      t.merge = countdowns.add(int32_t(stretches));
    }
    private_floats =
        std::max(private_floats, t.parts == MlaParts::kPieces   ? several * shape.part_floats()
                                 : t.parts == MlaParts::kGroups ? t.pieces.in_group() * floats * heads
                                                                : (t.pieces.in_group() + several) * floats * heads);
    queries = std::max(queries, rows * ceil_div(heads, mla_heads));
    for (int64_t u = 0; u < units; u += stretch) {
      const int64_t end = std::min(units, u + stretch);
      t.p0 = whole_groups ? t.pieces.group_begin(u) : u;
      t.p1 = whole_groups ? t.pieces.group_begin(end) : end;
      tasks.push_back(t);
    }
  }
}

// The heads of a task share the latents, converted to the kind that kv_b reads.
void MlaSchedule::add_expanded(const Run& run, const RowSpan& span, int64_t r0, int64_t r1, int64_t fair) {
  const int64_t context = run.batch.source->context_len[span.sequence], cost = expanded_cost(shape, context + r0, context + r1);
  const int64_t heads = std::clamp<int64_t>(fair / (4 * cost), 1, shape.heads);
  for (int64_t h = 0; h < shape.heads; h += heads) {
    MlaTask t{};
    t.expanded = true;
    t.sequence = span.sequence;
    t.h0 = h;
    t.h1 = std::min(h + heads, shape.heads);
    t.r0 = r0;
    t.r1 = r1;
    t.pieces = pieces(run, span, r0, r1);
    t.cost = cost * (t.h1 - t.h0);
    states = std::max(states, (r1 - r0) * (t.h1 - t.h0));
    tasks.push_back(t);
  }
}

std::shared_ptr<MlaSchedule> mla_schedule(StepReader& s) {
  const MlaShape shape{s.positive("heads", s.step.heads),     s.positive("nope", s.step.nope),
                       s.positive("rope", s.step.rope),       s.positive("rank", s.step.rank),
                       s.positive("v_dim", s.step.v_dim),     s.step.top_k,
                       (s.step.flags & DSO_FLAG_EXPAND) != 0, {s.step.window, s.step.sinks}};
  if (shape.top_k < 0) s.refuse("top_k is %d, must not be negative", s.step.top_k);
  if (s.step.window < 0) s.refuse("window is %d, must not be negative", s.step.window);
  if (s.step.sinks < 0 || (s.step.sinks > 0 && s.step.window == 0))
    s.refuse("sinks is %d with a window of %d: must be 0 without a window, and never negative", s.step.sinks, s.step.window);
  if (shape.top_k > 0 && s.step.window > 0)
    s.refuse("top_k is %d with a window of %d: use one of them", s.step.top_k, s.step.window);
  if (shape.top_k > 0 && shape.expand)
    s.refuse("top_k is %d with the EXPAND flag, but chosen tokens are never expanded", s.step.top_k);
  if (shape.expand && !shape.can_expand())
    s.refuse("head_dim %lld and v_dim %lld cannot be expanded: both must be even and at most %d", (long long)shape.head_dim(),
             (long long)shape.v_dim, int(max_head_dim));
  return shared_schedule(s.plan().mla_schedules, shape);
}

}  // namespace dso
