// Latent attention through plans, over ragged batches of both phases and both forms, dense, sparse and with a window: against
// softmax in double; a row's bits are the same alone and in a batch, with any number of threads; a NaN stays with the rows that
// see it; and blocks that no row sees may be missing.
#include <algorithm>
#include <functional>
#include <memory>

#include "cache.hpp"
#include "plan_parts.hpp"

namespace {

struct Shape {
  int32_t heads, nope, rope, rank, v_dim, top_k;
  int32_t kv_type, format;  // of the cache, and of kv_b
  int32_t out_kind = DSO_SLOT_F32, window = 0, sinks = 0;
  bool sees(int32_t row, int32_t t) const { return t <= row && (window == 0 || row - t < window || t < sinks); }
  int32_t query() const { return heads * (nope + rope); }
  int32_t latent() const { return rank + rope; }
  int32_t out() const { return heads * v_dim; }
  int32_t index() const { return top_k > 0 ? nope + rope : 0; }  // the indexer reads the same q
};

constexpr int32_t kBlocks = 160;
constexpr float kScale = 0.4f;

struct Weights {            // shared by plans
  std::vector<float> kv_b;  // [heads, nope + v_dim, rank]
  std::vector<std::unique_ptr<Buffer>> packed;
  std::vector<float> frequencies, norm;
  std::vector<dso_weight>
      table;  // kv_b, keys, values, embedding, the indexer's weights and key, of the last product, frequencies, norm

  Weights(const Shape& s, const Kernels& k, Random& random) {
    dso_context context{std::make_shared<Context>(k, 1)};
    kv_b = normal((size_t)s.heads * (s.nope + s.v_dim) * s.rank, 0.5f, random);
    const int32_t keys = s.format == DSO_F32 ? DSO_F32 : DSO_BF16;
    std::vector<float> k_b, v_b;
    for (int64_t h = 0; h < s.heads; ++h) {
      const float* head = kv_b.data() + h * (s.nope + s.v_dim) * s.rank;
      for (int64_t i = 0; i < s.rank; ++i)
        for (int64_t j = 0; j < s.nope; ++j) k_b.push_back(head[j * s.rank + i]);
      v_b.insert(v_b.end(), head + s.nope * s.rank, head + (s.nope + s.v_dim) * s.rank);
    }
    add(context, kv_b, s.format, 1, s.heads * (s.nope + s.v_dim), s.rank);
    add(context, k_b, keys, s.heads, s.rank, s.nope);
    add(context, v_b, s.format, s.heads, s.v_dim, s.rank);
    add(context, {0}, DSO_F32, 1, 1, s.query(), true);  // the embedding: batches bring their own
    if (s.top_k > 0) {
      add(context, normal((size_t)s.heads * s.query(), 0.3f, random), DSO_F32, 1, s.heads, s.query());
      add(context, normal((size_t)s.index() * s.latent(), 0.3f, random), DSO_F32, 1, s.index(), s.latent());
    } else {
      table.resize(6, table[3]);
    }
    std::vector<float> one((size_t)s.out() * (size_t)s.out());
    for (int64_t i = 0; i < s.out(); ++i) one[(size_t)(i * s.out() + i)] = 1;
    add(context, one,
        s.out_kind == DSO_SLOT_BF16  ? DSO_BF16
        : s.out_kind == DSO_SLOT_F32 ? DSO_F32
                                     : DSO_INT8,
        1, s.out(), s.out());
    frequencies = normal(s.rope / 2, 1, random);
    norm = normal(s.rank, 1, random);
    table.push_back({DSO_VECTOR, 1, s.rope / 2, 0, frequencies.data(), 2 * s.rope});
    table.push_back({DSO_VECTOR, 1, s.rank, 0, norm.data(), 4 * s.rank});
  }

 private:
  void add(dso_context& c, std::vector<float> w, int32_t format, int32_t count, int32_t rows, int32_t cols, bool zero = false) {
    if (zero) w.assign((size_t)rows * (size_t)cols, 0.0f);
    table.push_back(packed_weight(&c, format, w, count, rows, cols, packed));
  }
};

struct Part {  // a sequence's rows in a batch
  int32_t context, rows, phase;
  const float *q, *latent;
  const int32_t* table;
};

using Steps = std::vector<dso_step>;
using Slots = std::vector<dso_slot>;

class Plan {
 public:
  // `spoil` introduces an error, which the message `error` must report.
  Plan(const Shape& s, const Weights& w, const Kernels& kernels, int threads,
       const std::function<void(Steps&, Slots&)>& spoil = nullptr)
      : s_(s), context_{std::make_shared<Context>(kernels, threads)} {
    Slots slots;
    const int32_t last = s.out();
    for (int32_t width : {s.query(), s.latent(), s.heads, std::max(1, s.index()), std::max(1, s.top_k), s.heads * s.latent(),
                          s.heads * s.rank, last})
      slots.push_back({DSO_SLOT_F32, width, 0, 0});
    slots.push_back({s.out_kind, last, 0, 0});
    slots.push_back({DSO_SLOT_F32, last, 0, 0});
    slots.push_back({DSO_SLOT_F32, s.rope, 0, 0});
    step(DSO_OP_EMBEDDING, {}, {0}, {3});
    step(DSO_OP_STATE_IN, {}, {1}, {});
    step(DSO_OP_ROPE_TABLE, {}, {10}, {7});
    step(DSO_OP_LATENT, {1, 10}, {1}, {8});
    steps_.back().flags = s.heads % 2 ? DSO_FLAG_INTERLEAVED : 0;
    if (s.top_k > 0) {
      step(DSO_OP_LINEAR, {0}, {2}, {4});
      step(DSO_OP_LINEAR, {1}, {3}, {5});
      step(DSO_OP_INDEX_WRITE, {3}, {}, {});
    }
    step(DSO_OP_LATENT_WRITE, {1}, {}, {});
    if (s.top_k > 0) step(DSO_OP_INDEX_CHOOSE, {0, 2}, {4}, {});
    step(DSO_OP_MLA_ABSORB, {0}, {5}, {1});
    step(DSO_OP_MLA_ATTENTION, s.top_k > 0 ? std::vector<int32_t>{0, 5, 4} : std::vector<int32_t>{0, 5}, {6, 7}, {0});
    step(DSO_OP_MLA_VALUE, {6, 7}, {8}, {2});
    if (s.out_kind != DSO_SLOT_F32) step(DSO_OP_LINEAR, {8}, {9}, {6});
    step(DSO_OP_HIDDEN_OUT, {s.out_kind == DSO_SLOT_F32 ? 8 : 9}, {}, {});
    if (s.top_k > 0) {
      step(DSO_OP_HIDDEN_OUT, {4}, {}, {});
      steps_.back().layer = chosen_at();
    }
    if (spoil) spoil(steps_, slots);
    if (dso_plan_create(&context_, steps_.data(), (int32_t)steps_.size(), slots.data(), (int32_t)slots.size(), w.table.data(),
                        (int32_t)w.table.size(), 1, &plan_))
      error = dso_last_error();
    check(spoil || error.empty(), "plan: %s", error.c_str());
  }
  ~Plan() { dso_plan_destroy(plan_); }
  Plan(const Plan&) = delete;

  std::string error;
  struct Out {
    std::vector<float> y, chosen;  // [T, heads * v_dim], [T, top_k]
  };
  Out run(dso_cache& cache, const std::vector<Part>& parts) {
    std::vector<float> q, latent;
    std::vector<int32_t> rows, context, phase, table, positions;
    for (const Part& p : parts) {
      q.insert(q.end(), p.q, p.q + (int64_t)p.rows * s_.query());
      latent.insert(latent.end(), p.latent, p.latent + (int64_t)p.rows * s_.latent());
      rows.push_back(p.rows);
      context.push_back(p.context);
      phase.push_back(p.phase);
      table.insert(table.end(), p.table, p.table + kBlocks);
      for (int32_t r = 0; r < p.rows; ++r) positions.push_back(p.context + r);
    }
    dso_batch b{};
    for (int32_t n : rows) b.T += n;
    b.S = (int32_t)parts.size();
    b.max_blocks = kBlocks;
    b.positions = positions.data();
    b.query_len = rows.data();
    b.context_len = context.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.inputs_embeds = q.data();
    b.states = latent.data();
    b.cache = &cache;
    const size_t T = (size_t)b.T, before = T * (size_t)s_.top_k * (size_t)chosen_at();
    std::vector<float> hidden(std::max(T * (size_t)s_.out(), before + T * (size_t)s_.top_k), 12345.0f);
    b.hidden = hidden.data();
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    return {{hidden.begin(), hidden.begin() + (int64_t)T * s_.out()},
            {hidden.begin() + (int64_t)before, hidden.begin() + (int64_t)(before + T * (size_t)s_.top_k)}};
  }

 private:
  int32_t chosen_at() const {
    return s_.top_k > 0 ? (s_.out() + s_.top_k - 1) / s_.top_k : 0;
  }  // after y, in rows of chosen tokens
  void step(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out, const std::vector<int32_t>& w) {
    dso_step s = step_of(op, in, out, w);
    s.heads = s_.heads;
    s.nope = s_.nope;
    s.rope = s_.rope;
    s.rank = s_.rank;
    s.v_dim = s_.v_dim;
    s.index = s_.index();
    s.top_k = s_.top_k;
    if (op == DSO_OP_MLA_ABSORB || op == DSO_OP_MLA_ATTENTION || op == DSO_OP_MLA_VALUE)
      s.window = s_.window, s.sinks = s_.sinks;
    s.eps = 1e-6f;
    s.scale = op == DSO_OP_EMBEDDING || op == DSO_OP_ROPE_TABLE ? 1.0f : kScale;
    steps_.push_back(s);
  }

  const Shape s_;
  dso_context context_;
  Steps steps_;
  dso_plan* plan_ = nullptr;
};

void against_doubles(const Shape& s, const Weights& w, const char* what, const float* q, const float* rows,
                     const std::vector<int32_t>& tokens, const float* got) {
  for (int64_t h = 0; h < s.heads; ++h) {
    const float *head = w.kv_b.data() + h * (s.nope + s.v_dim) * s.rank, *mine = q + h * (s.nope + s.rope);
    std::vector<double> absorbed((size_t)s.latent()), logit, mixed((size_t)s.rank);
    for (int64_t j = 0; j < s.nope; ++j)
      for (int64_t i = 0; i < s.rank; ++i) absorbed[(size_t)i] += (double)head[j * s.rank + i] * mine[j];
    for (int64_t i = 0; i < s.rope; ++i) absorbed[(size_t)(s.rank + i)] = mine[s.nope + i];
    double top = -INFINITY, total = 0, largest = 0;
    for (int32_t t : tokens) {
      double x = 0;
      for (int64_t i = 0; i < s.latent(); ++i) x += kScale * absorbed[(size_t)i] * rows[(int64_t)t * s.latent() + i];
      logit.push_back(x);
      top = std::max(top, x);
    }
    for (size_t t = 0; t < tokens.size(); ++t) {
      const double weight = std::exp(logit[t] - top);
      total += weight;
      for (int64_t i = 0; i < s.rank; ++i) mixed[(size_t)i] += weight * rows[(int64_t)tokens[t] * s.latent() + i];
    }
    std::vector<double> want((size_t)s.v_dim);
    for (int64_t c = 0; c < s.v_dim; ++c) {
      for (int64_t i = 0; i < s.rank; ++i) want[(size_t)c] += head[(s.nope + c) * s.rank + i] * mixed[(size_t)i] / total;
      largest = std::max(largest, std::fabs(want[(size_t)c]));
    }
    const bool exact = s.kv_type == DSO_KV_F32 && s.format == DSO_F32 && s.out_kind == DSO_SLOT_F32;
    const double bound = (exact                  ? 1e-5
                          : s.format == DSO_INT8 ? 2e-1
                                                 : 4e-2) *
                         std::max(0.5, largest);  // int8 moves logits most
    for (int64_t c = 0; c < s.v_dim; ++c)
      if (!check(std::fabs(got[h * s.v_dim + c] - want[(size_t)c]) <= bound, "%s: head %ld [%ld] of %zu tokens is %g, not %g",
                 what, (long)h, (long)c, tokens.size(), got[h * s.v_dim + c], want[(size_t)c]))
        return;
  }
}

struct Sequence {
  int32_t context, rows, phase;
  std::vector<float> q, latent;  // of all its tokens
  std::vector<int32_t> table;
};

bool same_rows(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!same(a[i], b[i])) return false;
  return true;
}

void ragged(const Variant& v, const Shape& s, const std::vector<std::pair<int32_t, int32_t>>& decode,
            const std::vector<std::pair<int32_t, int32_t>>& prefill, Random& random) {
  const Weights w(s, *v.kernels, random);
  Plan plan(s, w, *v.kernels, 1 + random.below(5)), other(s, w, *v.kernels, 1 + random.below(3));
  dso_cache cache(*v.kernels, {s.kv_type, 1, 0, 0, s.rank, s.rope, s.index(), 0, nullptr}, kBlocks);
  memset(cache.arena.data(), 0xff, (size_t)(kBlocks * cache.block_bytes()));  // what nobody wrote is NaN
  const std::string name = v.name + " kv " + std::to_string(s.kv_type) + " kv_b " + std::to_string(s.format) + " [" +
                           std::to_string(s.heads) + ", " + std::to_string(s.nope) + "+" + std::to_string(s.rope) + ", " +
                           std::to_string(s.rank) + ", " + std::to_string(s.v_dim) + "] top_k " + std::to_string(s.top_k) +
                           " out " + std::to_string(s.out_kind) + " window " + std::to_string(s.window) + "+" +
                           std::to_string(s.sinks);
  std::vector<Sequence> all;
  int32_t block = kBlocks - 1;  // downwards: the arena's last block is in use
  auto add = [&](int32_t context, int32_t rows, int32_t phase) {
    Sequence q{context,
               rows,
               phase,
               normal((size_t)(context + rows) * s.query(), 0.2f, random),
               normal((size_t)(context + rows) * s.latent(), 0.7f, random),
               {}};
    for (int32_t i = 0; i < (context + rows + 31) / 32; ++i) q.table.push_back(block--);
    q.table.resize(kBlocks, 0);
    all.push_back(std::move(q));
  };
  for (auto [context, rows] : decode) add(context, rows, DSO_PHASE_DECODE);
  for (auto [context, rows] : prefill) add(context, rows, DSO_PHASE_PREFILL);
  if (!check(block >= 0, "%s: too few blocks", name.c_str())) return;
  auto part = [&](const Sequence& q, int32_t from, int32_t rows, int32_t phase) {
    return Part{
        from,          rows, phase, q.q.data() + (int64_t)from * s.query(), q.latent.data() + (int64_t)from * s.latent(),
        q.table.data()};
  };
  std::vector<Part> step;
  std::vector<std::vector<int32_t>> holes;  // tables without the blocks that no row of the step sees
  for (Sequence& q : all) {
    if (q.context > 0) other.run(cache, {part(q, 0, q.context, DSO_PHASE_PREFILL)});
    step.push_back(part(q, q.context, q.rows, q.phase));
    std::vector<int32_t>& table = holes.emplace_back(q.table);
    for (int32_t b = 0; b * 32 < q.context; ++b) {
      bool seen = false;
      for (int32_t t = b * 32; t < b * 32 + 32; ++t)
        seen = seen || s.sees(q.context, t);  // visible to the first row, which looks back furthest
      if (!seen && (b + 1) * 32 <= q.context) table[(size_t)b] = -1;
    }
  }
  for (size_t i = 0; i < all.size(); ++i) step[i].table = holes[i].data();
  const Plan::Out together = plan.run(cache, step);
  int64_t row = 0;
  std::vector<int64_t> first;
  for (const Sequence& q : all) {
    first.push_back(row);
    std::vector<float> rows((size_t)((q.context + q.rows) * s.latent()));
    cache.read(0, q.table.data(), q.context + q.rows, rows.data(), nullptr);
    for (int32_t r = 0; r < q.rows; ++r, ++row) {
      std::vector<int32_t> tokens;
      const int32_t sees = q.context + r + 1;
      if (s.top_k == 0 || sees <= s.top_k) {
        for (int32_t t = 0; t < sees; ++t)
          if (s.sees(sees - 1, t)) tokens.push_back(t);
      } else {
        for (int32_t j = 0; j < s.top_k; ++j) tokens.push_back((int32_t)together.chosen[(size_t)(row * s.top_k + j)]);
        const bool fine = tokens.front() >= 0 && tokens.back() < sees &&
                          std::adjacent_find(tokens.begin(), tokens.end(), [](int a, int b) { return a >= b; }) == tokens.end();
        if (!check(fine, "%s: chosen tokens of row %d", name.c_str(), r)) return;
      }
      if (r % 7 == 0 || r + 1 == q.rows)
        against_doubles(s, w, name.c_str(), q.q.data() + (int64_t)(q.context + r) * s.query(), rows.data(), tokens,
                        together.y.data() + row * s.out());
    }
  }
  // Each alone; sequences in decode phase also row by row.
  for (size_t i = 0; i < all.size(); ++i) {
    const Sequence& q = all[i];
    const float* want = together.y.data() + first[i] * s.out();
    const Plan::Out alone = other.run(cache, {step[i]});
    check(same_rows(alone.y.data(), want, (int64_t)q.rows * s.out()), "%s: sequence %zu of %d rows after %d differs alone",
          name.c_str(), i, q.rows, q.context);
    if (q.phase != DSO_PHASE_DECODE) continue;
    for (int32_t r = 0; r < q.rows; ++r) {
      const Plan::Out one = plan.run(cache, {part(q, q.context + r, 1, DSO_PHASE_DECODE)});
      check(same_rows(one.y.data(), want + (int64_t)r * s.out(), s.out()), "%s: row %d of %d after %d differs alone",
            name.c_str(), r, q.rows, q.context);
    }
  }
  if (s.window >= 2000) {
    Shape whole = s;
    whole.window = whole.sinks = 0;
    check(Plan(whole, w, *v.kernels, 2).run(cache, step).y == together.y, "%s: a window that covers all differs from none",
          name.c_str());
  }
  // A NaN in a token of one sequence of the batch: rows before it, and all other sequences, are unchanged.
  for (size_t i = 0; i < all.size(); ++i) {
    Sequence& q = all[i];
    const int32_t bad = random.below(q.rows);
    float& number = q.latent[(size_t)((int64_t)(q.context + bad) * s.latent() + random.below(s.latent()))];
    const float was = number;
    number = random.below(2) ? NAN : INFINITY;
    const Plan::Out out = plan.run(cache, step);
    for (size_t j = 0; j < all.size(); ++j) {
      const int64_t clean = j == i ? bad : all[j].rows;
      check(same_rows(out.y.data() + first[j] * s.out(), together.y.data() + first[j] * s.out(), clean * s.out()),
            "%s: %g in row %d of sequence %zu (%d rows after %d) reached sequence %zu", name.c_str(), number, bad, i, q.rows,
            q.context, j);
    }
    if (s.top_k == 0 && std::isnan(number))
      check(std::isnan(out.y[(size_t)((first[i] + bad) * s.out())]), "%s: a NaN was lost", name.c_str());
    number = was;
    plan.run(cache, step);
  }
}

// A step with one invalid field is rejected, and the message names it.
void refusals(const Kernels& k) {
  Random random(2);
  const Shape s{2, 12, 4, 20, 10, 40, DSO_KV_F32, DSO_F32};  // as many sums of a row as chosen tokens
  Weights w(s, k, random);
  auto refused = [&](const char* words, int op, const std::function<void(dso_step&)>& change) {
    Plan plan(s, w, k, 1, [&](Steps& steps, Slots&) {
      change(*std::find_if(steps.begin(), steps.end(), [&](const dso_step& x) { return x.op == op; }));
    });
    check(plan.error.find(words) != std::string::npos, "expected \"%s\", got \"%s\"", words, plan.error.c_str());
  };
  refused("step 3 (LATENT): eps is nan", DSO_OP_LATENT, [](dso_step& x) { x.eps = NAN; });
  refused("rope is 3, must be even", DSO_OP_LATENT, [](dso_step& x) { x.rope = 3, x.rank = 21; });
  refused("rank is 0", DSO_OP_LATENT_WRITE, [](dso_step& x) { x.rank = 0, x.rope = 24; });
  refused("layer is 70000", DSO_OP_LATENT_WRITE, [](dso_step& x) { x.layer = 70000; });
  refused("slot 4 is both an input and an out", DSO_OP_MLA_ATTENTION, [](dso_step& x) { x.out[0] = x.in[2]; });
  refused("w[0] is 44 x 20, must be 46 x 20", DSO_OP_MLA_ATTENTION, [](dso_step& x) { x.v_dim = 11; });
  refused("in[1] must have width 48, but slot 4 has 40", DSO_OP_MLA_ATTENTION, [](dso_step& x) { x.in[1] = 4; });
  refused("top_k is -1", DSO_OP_MLA_ABSORB, [](dso_step& x) { x.top_k = -1; });
  refused("top_k is 40 with a window of 7", DSO_OP_MLA_ATTENTION, [](dso_step& x) { x.window = 7; });
  refused("window is -1", DSO_OP_MLA_VALUE, [](dso_step& x) { x.window = -1; });
  refused("sinks is 4 with a window of 0", DSO_OP_MLA_ABSORB, [](dso_step& x) { x.sinks = 4; });
  refused("a stack of 2 matrices, must be 3", DSO_OP_MLA_ABSORB, [](dso_step& x) { x.heads = 3; });
  refused("chosen tokens are never expanded", DSO_OP_MLA_ATTENTION, [](dso_step& x) { x.flags = DSO_FLAG_EXPAND; });
  refused("flags are 8", DSO_OP_MLA_VALUE, [](dso_step& x) { x.flags = DSO_FLAG_EXPAND, x.top_k = 0; });
  refused("the cache has one shape", DSO_OP_INDEX_CHOOSE, [](dso_step& x) { x.index = 8, x.heads = 4; });
}

}  // namespace

int main() {
  Random random(21);
  refusals(*variants().back().kernels);
  for (const Variant& v : variants())
    for (int32_t type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4})
      for (int32_t top_k : {0, 40}) {
        const int32_t format = type == DSO_KV_F32 ? DSO_F32 : type == DSO_KV_BF16 ? DSO_BF16 : DSO_INT8;
        ragged(v, {5, 12, 4, 36, 10, top_k, type, format}, {{300, 1}, {0, 1}, {31, 5}}, {{0, 90}, {260, 70}, {0, 1}, {500, 3}},
               random);
        ragged(v, {1, 2, 2, 2, 2, top_k, type, format}, {{40, 1}}, {{10, 70}, {255, 2}}, random);
        ragged(v, {17, 6, 2, 20, 7, top_k, type, format}, {{513, 12}}, {{0, 100}},
               random);  // values of odd size: never expanded
        ragged(v, {3, 32, 16, 64, 32, top_k, type, format, type == DSO_KV_F32 ? DSO_SLOT_BF16 : DSO_SLOT_Q16}, {{70, 2}},
               {{0, 280}, {5, 64}}, random);
        if (top_k > 0) continue;
        ragged(v, {5, 12, 4, 36, 10, 0, type, format, DSO_SLOT_F32, 100, 5}, {{700, 1}, {0, 1}, {98, 12}, {400, 9}},
               {{0, 190}, {260, 70}, {0, 1}, {900, 3}}, random);
        ragged(v, {1, 2, 2, 2, 2, 0, type, format, DSO_SLOT_F32, 1, 0}, {{40, 1}}, {{10, 70}, {255, 2}}, random);
        ragged(v, {17, 6, 2, 20, 7, 0, type, format, DSO_SLOT_F32, 300, 290}, {{613, 12}}, {{0, 700}}, random);
        ragged(v, {3, 32, 16, 64, 32, 0, type, format, DSO_SLOT_F32, 33, 64}, {{70, 2}}, {{0, 280}, {500, 64}}, random);
        ragged(v, {3, 32, 16, 64, 32, 0, type, format, DSO_SLOT_F32, 2000, 3}, {{70, 2}}, {{0, 280}, {5, 64}}, random);
      }
  return report("test_latent_plan");
}
