// Training: splits attention into tasks, and implements its C interface.
#include "../kernels/train_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check_arguments.hpp"
#include "dso_train.h"
#include "layout.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kBlock = train_attn_block;
// Queries and heads of a forward task: each packs all keys that it sees, which then takes one or two percent of its time.
constexpr int64_t kQueries = 1536;
// The keys of sequences longer than kWhole are split, so that a few long sequences keep all threads busy. Each part has its own
// sums for the gradient of q, so there are few parts. Nothing here may depend on the number of threads, or the gradients would.
constexpr int64_t kWhole = 1536, kPiece = 1024, kMostPieces = 4;

using Task = TrainAttnTask;

struct Work {
  Task task;
  double pairs;         // of queries and keys: the task's cost
  int64_t q_sums = -1;  // offset of its sums for the gradient of q, in floats; -1: in the thread's own scratch (the only part)
};

template <class Byte>
Heads<Byte> from(const dso_train_heads& h, int64_t size, int64_t row, int64_t token, int64_t head) {
  return {static_cast<uint8_t*>(h.data) + (h.row * row + h.token * token + h.head * head) * size, h.token, h.head};
}

int64_t size_of(int32_t type) { return type == DSO_TYPE_BF16 ? 2 : 4; }

// All of sequence `i` and one kv head.
Task task_of(const dso_train_attention& a, int64_t i, int64_t kv_head) {
  const int64_t row = a.begin[i] / a.row_tokens, token = a.begin[i] % a.row_tokens, group = a.heads / a.kv_heads,
                head = kv_head * group;
  const int64_t size = size_of(a.type), all = a.rows * a.row_tokens;
  Task t{};
  t.type = a.type, t.tokens = a.end[i] - a.begin[i], t.qk_width = a.qk_width, t.v_width = a.v_width;
  t.group = group, t.scale = a.scale, t.window = a.window < t.tokens ? a.window : 0;
  t.end = t.tokens;
  t.q = from<const void>(a.q, size, row, token, head), t.o = from<void>(a.o, size, row, token, head);
  t.k = from<const void>(a.k, size, row, token, kv_head), t.v = from<const void>(a.v, size, row, token, kv_head);
  t.largest = a.state + head * all + a.begin[i], t.sum = t.largest + a.heads * all, t.state_head = all;
  if (a.o_grad.data) {
    t.o_grad = from<const void>(a.o_grad, size, row, token, head);
    t.q_grad = from<void>(a.q_grad, size, row, token, head);
    t.k_grad = from<void>(a.k_grad, size, row, token, kv_head), t.v_grad = from<void>(a.v_grad, size, row, token, kv_head);
  }
  return t;
}

double pairs_of(const Task& t, int64_t begin, int64_t end) {  // pairs of queries [begin, end) and the keys they see
  const double most = t.window ? double(t.window) : double(end);
  return double(t.group) * double(end - begin) * std::min(double(begin + end) / 2, most);
}

void longest_first(std::vector<Work>& work) {
  std::stable_sort(work.begin(), work.end(), [](const Work& a, const Work& b) { return a.pairs > b.pairs; });
}

template <class Call>
void each_task(const dso_train_attention& a, Call call) {
  for (int64_t i = 0; i < a.sequences; ++i)
    for (int64_t h = 0; h < a.kv_heads && a.end[i] > a.begin[i]; ++h) call(task_of(a, i, h));
}

std::vector<Work> forward_work(const dso_train_attention& a) {
  std::vector<Work> work;
  each_task(a, [&](Task t) {
    const int64_t step = std::max(4 * kBlock, round_up(kQueries / t.group, kBlock));
    for (int64_t begin = 0; begin < t.tokens; begin += step) {
      t.begin = begin, t.end = std::min(begin + step, t.tokens);
      work.push_back({t, pairs_of(t, t.begin, t.end)});
    }
  });
  longest_first(work);
  return work;
}

// Boundaries that split keys [0, tokens) into parts with equal numbers of visible (query, key) pairs.
std::vector<int64_t> pieces_of(const Task& t) {
  const int64_t pieces = t.tokens <= kWhole ? 1 : std::min(ceil_div(t.tokens, kPiece), kMostPieces);
  std::vector<int64_t> borders = {0};
  for (int64_t i = 1; i < pieces; ++i) {
    const double part = double(i) / double(pieces), share = t.window ? part : 1 - std::sqrt(1 - part);
    borders.push_back(int64_t(share * double(t.tokens)) / kBlock * kBlock);
  }
  borders.push_back(t.tokens);
  return borders;
}

int64_t q_sums_of(const Task& t) {  // floats
  return t.group * ceil_div(t.tokens - t.begin, kBlock) * train_attn_query_grad(t.qk_width);
}

// Number of blocks of queries that see keys of the task.
int64_t query_blocks(const Task& t) {
  const int64_t last = t.window ? std::min(t.tokens, round_up(t.end, kBlock) + t.window - 1) : t.tokens;
  return ceil_div(last - t.begin, kBlock);
}

struct BackwardWork {
  std::vector<Work> work;
  std::vector<std::vector<Work>> cut;  // parts of each split task, whose sums for the gradient of q must be added up
  int64_t sums = 0;                    // floats for all parts
};

BackwardWork backward_work(const dso_train_attention& a) {
  BackwardWork all;
  each_task(a, [&](Task t) {
    const std::vector<int64_t> borders = pieces_of(t);
    const size_t pieces = borders.size() - 1;
    const double pairs = pairs_of(t, 0, t.tokens) / double(pieces);
    if (pieces == 1) return all.work.push_back({t, pairs, -1});
    all.cut.emplace_back();
    for (size_t p = 0; p < pieces; ++p) {
      t.begin = borders[p], t.end = borders[p + 1];
      all.work.push_back({t, pairs, all.sums});
      all.cut.back().push_back(all.work.back());
      all.sums += q_sums_of(t);
    }
  });
  longest_first(all.work);
  return all;
}

void forward(Context& c, const dso_train_attention& a) {
  const TrainAttention& kernels = *c.kernels.train_attention;
  const std::vector<Work> work = forward_work(a);
  int64_t scratch = 0;
  for (const Work& w : work) scratch = std::max(scratch, round_up(kernels.forward_scratch(w.task), 4096));
  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  c.scratch.reserve(scratch * team.threads());
  Stages stages({{int64_t(work.size()),
                  [&](int64_t i, int thread) { kernels.forward(work[size_t(i)].task, c.scratch.data() + thread * scratch); }}});
  team.run(stages);
}

// Block `block` of a head's gradient of q, from the sums of `pieces`, in order of their keys.
void write_q_grad(const TrainAttention& kernels, const Work* pieces, size_t count, const float* const* sums, int64_t head,
                  int64_t block) {
  const Task& whole = pieces->task;  // the first part starts where the sequence does
  const float* parts[kMostPieces];
  int64_t seen = 0;
  for (size_t p = 0; p < count; ++p) {
    const Task& t = pieces[p].task;
    const int64_t own = block - t.begin / kBlock;
    if (own < 0 || own >= query_blocks(t)) continue;
    parts[seen++] = sums[p] + (head * ceil_div(t.tokens - t.begin, kBlock) + own) * train_attn_query_grad(t.qk_width);
  }
  const int64_t at = block * kBlock, offset = head * whole.q_grad.head + at * whole.q_grad.token;
  void* out = static_cast<uint8_t*>(whole.q_grad.data) + offset * size_of(whole.type);
  kernels.query_grad(whole.type, parts, seen, std::min(kBlock, whole.tokens - at), whole.qk_width, whole.scale, out,
                     whole.q_grad.token);
}

void backward(Context& c, const dso_train_attention& a) {
  const TrainAttention& kernels = *c.kernels.train_attention;
  const BackwardWork all = backward_work(a);
  int64_t scratch = 0, own = 0;
  for (const Work& w : all.work) {
    scratch = std::max(scratch, round_up(kernels.backward_scratch(w.task), 4096));
    if (w.q_sums < 0) own = std::max(own, round_up(q_sums_of(w.task) * 4, 4096));
  }
  std::vector<int64_t> first = {0};  // blocks of queries before each split task
  for (const std::vector<Work>& pieces : all.cut)
    first.push_back(first.back() + pieces[0].task.group * ceil_div(pieces[0].task.tokens, kBlock));

  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  c.scratch.reserve((scratch + own) * team.threads() + all.sums * 4);
  const auto floats_at = [&](int64_t bytes) { return reinterpret_cast<float*>(c.scratch.data() + bytes); };
  float* const sums = floats_at((scratch + own) * team.threads());
  const auto piece = [&](int64_t i, int thread) {
    const Work& w = all.work[size_t(i)];
    const int64_t memory = thread * (scratch + own);
    Task t = w.task;
    t.q_sums = w.q_sums < 0 ? floats_at(memory + scratch) : sums + w.q_sums;
    kernels.backward(t, c.scratch.data() + memory);
    for (int64_t h = 0; h < t.group && w.q_sums < 0; ++h)
      for (int64_t b = 0; b < ceil_div(t.tokens, kBlock); ++b) write_q_grad(kernels, &w, 1, &t.q_sums, h, b);
  };
  const auto add_up = [&](int64_t i, int) {
    const size_t at = size_t(std::upper_bound(first.begin(), first.end(), i) - first.begin()) - 1;
    const std::vector<Work>& pieces = all.cut[at];
    const float* parts[kMostPieces];
    for (size_t p = 0; p < pieces.size(); ++p) parts[p] = sums + pieces[p].q_sums;
    const int64_t blocks = ceil_div(pieces[0].task.tokens, kBlock), n = i - first[at];
    write_q_grad(kernels, pieces.data(), pieces.size(), parts, n / blocks, n % blocks);
  };
  Stages stages({{int64_t(all.work.size()), piece}, {first.back(), add_up}});
  team.run(stages);
}

// ---- the C interface

constexpr int64_t kMostTokens = int64_t(1) << 40;

void check(const dso_train_heads& h, const char* name) {
  if (!h.data) fail(DSO_EINVAL, "%s.data is NULL", name);
}

const dso_train_attention& checked(const dso_train_attention* given_one, bool backward) {
  const dso_train_attention& a = given(given_one, "attention");
  if (a.type != DSO_TYPE_F32 && a.type != DSO_TYPE_BF16) fail(DSO_EINVAL, "unknown type %d", a.type);
  if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads)
    fail(DSO_EINVAL, "%d heads cannot share %d kv heads: heads must be a multiple", a.heads, a.kv_heads);
  if (!is_head_dim(a.qk_width) || a.qk_width > train_attn_width)
    fail(DSO_EINVAL, "qk_width is %d; it must be even and at most %lld", a.qk_width, (long long)train_attn_width);
  if (!is_head_dim(a.v_width) || a.v_width > train_attn_width)
    fail(DSO_EINVAL, "v_width is %d; it must be even and at most %lld", a.v_width, (long long)train_attn_width);
  if (a.window < 0) fail(DSO_EINVAL, "window is %lld, must not be negative", (long long)a.window);
  if (a.rows < 0 || a.row_tokens < 0 || a.rows > kMostTokens || a.row_tokens > kMostTokens)
    fail(DSO_EINVAL, "invalid shape: %lld rows of %lld tokens", (long long)a.rows, (long long)a.row_tokens);
  if (a.sequences < 0) fail(DSO_EINVAL, "sequences is %lld, must not be negative", (long long)a.sequences);
  if (a.sequences > 0) given(a.begin, "begin"), given(a.end, "end"), given(a.state, "state");
  for (int64_t i = 0, before = 0; i < a.sequences; before = a.end[i++]) {
    const int64_t begin = a.begin[i], end = a.end[i];
    if (begin < before || end < begin || end > a.rows * a.row_tokens)
      fail(DSO_EINVAL, "sequence %lld has tokens %lld to %lld, must lie within %lld to %lld", (long long)i, (long long)begin,
           (long long)end, (long long)before, (long long)(a.rows * a.row_tokens));
    if (end > begin && begin / a.row_tokens != (end - 1) / a.row_tokens)
      fail(DSO_EINVAL, "sequence %lld, tokens %lld to %lld, crosses the end of a row of %lld", (long long)i, (long long)begin,
           (long long)end, (long long)a.row_tokens);
  }
  if (a.sequences == 0) return a;
  check(a.q, "q"), check(a.k, "k"), check(a.v, "v"), check(a.o, "o");
  if (backward) check(a.o_grad, "o_grad"), check(a.q_grad, "q_grad"), check(a.k_grad, "k_grad"), check(a.v_grad, "v_grad");
  return a;
}

}  // namespace
}  // namespace dso

extern "C" {

int32_t dso_train_attention_forward(dso_context* c, const dso_train_attention* a) {
  return dso::guarded([&] { dso::forward(dso::shared(c), dso::checked(a, false)); });
}
int32_t dso_train_attention_backward(dso_context* c, const dso_train_attention* a) {
  return dso::guarded([&] { dso::backward(dso::shared(c), dso::checked(a, true)); });
}

}  // extern "C"
