// Absorbed attention with long contexts, whose partial results are merged by groups of 8,192 tokens: pieces cover a row's
// visible tokens exactly once; results match those in double; and a row's bits are the same alone and in a batch, wherever
// tasks store their partial results.
#include <algorithm>
#include <memory>

#include "cache.hpp"
#include "plan_parts.hpp"
// After check.hpp, whose names layout.hpp also defines.
#include "mla_pieces.hpp"

namespace {

constexpr int32_t kNope = 4, kRope = 2, kValue = 4;
constexpr float kScale = 0.5f;

struct Case {
  int32_t heads, rank, window, sinks, context, rows;
  int32_t query() const { return heads * (kNope + kRope); }
  int32_t latent() const { return rank + kRope; }
  int32_t out() const { return heads * kValue; }
};

void pieces(Random& random) {
  const int64_t window = random.below(3) ? 1 + random.below(20000) : 0,
                sinks = window > 0 ? random.below(2) ? random.below(10) : random.below(12000) : 0;
  const int64_t i0 = random.below(30000), i1 = i0 + 1 + random.below(9);
  const MlaWindow w{window, sinks};
  const MlaPieces p = w.pieces(i0, i1);
  int64_t pairs = 0;
  for (int64_t i = i0; i < i1; ++i) {
    std::vector<int8_t> seen((size_t)i1);
    for (int64_t k = 0; k < p.count(); ++k) {
      const MlaPiece piece = p.at(k);
      const auto [begin, end] = w.within(piece, i);
      check(piece.tokens > 0 && piece.first / attn_chunk == (piece.first + piece.tokens - 1) / attn_chunk,
            "piece %ld: %ld tokens from %ld on", (long)k, (long)piece.tokens, (long)piece.first);
      for (int64_t t = begin; t < end; ++t) ++seen[(size_t)(piece.first + t)];
    }
    int64_t wrong = 0, count = 0;
    for (int64_t t = 0; t < i1; ++t) {
      const bool sees = t <= i && (window == 0 || i - t < window || t < sinks);
      wrong += seen[(size_t)t] != sees;
      count += sees;
    }
    pairs += count;
    check(wrong == 0 && count == w.seen(i), "window %ld sinks %ld rows [%ld, %ld): token %ld sees %ld tokens wrongly",
          (long)window, (long)sinks, (long)i0, (long)i1, (long)i, (long)wrong);
  }
  check(pairs == w.pairs(i0, i1), "window %ld sinks %ld rows [%ld, %ld): %ld pairs, not %ld", (long)window, (long)sinks,
        (long)i0, (long)i1, (long)w.pairs(i0, i1), (long)pairs);
  check(p.group_begin(0) == 0 && p.group_begin(p.groups()) == p.count(), "groups begin at %ld and end at %ld of %ld",
        (long)p.group_begin(0), (long)p.group_begin(p.groups()), (long)p.count());
  for (int64_t g = 0; g < p.groups(); ++g) {
    const int64_t first = p.group_begin(g), last = p.group_begin(g + 1) - 1;
    const bool one = first <= last && p.at(first).sinks == p.at(last).sinks &&
                     p.at(first).first / attn_chunk / 32 == p.at(last).first / attn_chunk / 32;
    check(one, "group %ld of %ld: pieces %ld to %ld", (long)g, (long)p.groups(), (long)first, (long)last);
  }
}

class Plan {
 public:
  Plan(const Case& c, const Kernels& kernels, int threads, uint64_t seed)
      : c_(c), context_{std::make_shared<Context>(kernels, threads)} {
    Random random(seed);
    keys = normal((size_t)c.heads * c.rank * kNope, 0.5f, random);
    values = normal((size_t)c.heads * kValue * c.rank, 0.5f, random);
    weights_.push_back(packed_weight(&context_, DSO_F32, keys, c.heads, c.rank, kNope, packed_));
    weights_.push_back(packed_weight(&context_, DSO_F32, values, c.heads, kValue, c.rank, packed_));
    weights_.push_back(packed_weight(&context_, DSO_F32, std::vector<float>((size_t)c.heads * (kNope + kValue) * c.rank), 1,
                                     c.heads * (kNope + kValue), c.rank, packed_));  // of expanded rows: there are none
    weights_.push_back(packed_weight(&context_, DSO_F32, std::vector<float>((size_t)c.query()), 1, 1, c.query(), packed_));
    std::vector<dso_slot> slots;
    for (int32_t w : {c.query(), c.heads * c.latent(), c.heads * c.rank, c.out(), c.out()})
      slots.push_back({DSO_SLOT_F32, w, 0, 0});
    step(DSO_OP_EMBEDDING, {}, {0}, {3});
    step(DSO_OP_MLA_ABSORB, {0}, {1}, {0});
    step(DSO_OP_MLA_ATTENTION, {0, 1}, {2, 3}, {2});
    step(DSO_OP_MLA_VALUE, {2, 3}, {4}, {1});
    step(DSO_OP_HIDDEN_OUT, {4}, {}, {});
    check(dso_plan_create(&context_, steps_.data(), (int32_t)steps_.size(), slots.data(), (int32_t)slots.size(),
                          weights_.data(), (int32_t)weights_.size(), 1, &plan_) == 0,
          "plan: %s", dso_last_error());
  }
  ~Plan() { dso_plan_destroy(plan_); }
  Plan(const Plan&) = delete;

  // Rows [from, from + rows) of q, in `sequences` sequences that share the same blocks, one after the other.
  std::vector<float> run(dso_cache& cache, const std::vector<int32_t>& table, const std::vector<float>& q, int32_t from,
                         int32_t rows, int32_t sequences = 1) {
    const size_t all = (size_t)(rows * sequences);
    std::vector<float> x, out(all * (size_t)c_.out(), NAN);
    std::vector<int32_t> query, context, phase, tables;
    for (int32_t s = 0; s < sequences; ++s) {
      x.insert(x.end(), q.begin() + (int64_t)from * c_.query(), q.begin() + (int64_t)(from + rows) * c_.query());
      query.push_back(rows);
      context.push_back(c_.context + from);
      phase.push_back(DSO_PHASE_DECODE);
      tables.insert(tables.end(), table.begin(), table.end());
    }
    dso_batch b{};
    b.T = (int32_t)all;
    b.S = sequences;
    b.max_blocks = (int32_t)table.size();
    b.query_len = query.data();
    b.context_len = context.data();
    b.phase = phase.data();
    b.block_table = tables.data();
    b.inputs_embeds = x.data();
    b.hidden = out.data();
    b.cache = &cache;
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    return out;
  }

  std::vector<float> keys, values;  // [heads, rank, nope], [heads, v_dim, rank]

 private:
  void step(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out, const std::vector<int32_t>& w) {
    dso_step s = step_of(op, in, out, w);
    s.heads = c_.heads;
    s.nope = kNope;
    s.rope = kRope;
    s.rank = c_.rank;
    s.v_dim = kValue;
    s.window = c_.window;
    s.sinks = c_.sinks;
    s.scale = op == DSO_OP_MLA_ATTENTION ? kScale : 1;
    steps_.push_back(s);
  }
  const Case c_;
  dso_context context_;
  std::vector<std::unique_ptr<Buffer>> packed_;
  std::vector<dso_weight> weights_;
  std::vector<dso_step> steps_;
  dso_plan* plan_ = nullptr;
};

void against_doubles(const Variant& v, const Case& c, int32_t type, const Plan& p, int32_t row, const float* q,
                     const std::vector<float>& latents, const float* got) {
  for (int32_t h = 0; h < c.heads; h += 1 + c.heads / 3) {
    std::vector<double> absorbed((size_t)c.latent()), logit, mixed((size_t)c.rank);
    for (int32_t i = 0; i < c.rank; ++i)
      for (int32_t j = 0; j < kNope; ++j)
        absorbed[(size_t)i] += (double)p.keys[(size_t)((h * c.rank + i) * kNope + j)] * q[h * (kNope + kRope) + j];
    for (int32_t i = 0; i < kRope; ++i) absorbed[(size_t)(c.rank + i)] = q[h * (kNope + kRope) + kNope + i];
    double top = -INFINITY, total = 0;
    std::vector<int32_t> tokens;
    for (int32_t t = 0; t <= c.context + row; ++t) {
      if (c.window > 0 && c.context + row - t >= c.window && t >= c.sinks) continue;
      double x = 0;
      for (int32_t i = 0; i < c.latent(); ++i)
        x += kScale * absorbed[(size_t)i] * latents[(size_t)t * (size_t)c.latent() + (size_t)i];
      tokens.push_back(t);
      logit.push_back(x);
      top = std::max(top, x);
    }
    for (size_t j = 0; j < tokens.size(); ++j) {
      const double weight = std::exp(logit[j] - top);
      total += weight;
      for (int32_t i = 0; i < c.rank; ++i)
        mixed[(size_t)i] += weight * latents[(size_t)tokens[j] * (size_t)c.latent() + (size_t)i];
    }
    for (int32_t i = 0; i < kValue; ++i) {
      double want = 0;
      for (int32_t j = 0; j < c.rank; ++j) want += p.values[(size_t)((h * kValue + i) * c.rank + j)] * mixed[(size_t)j] / total;
      const double bound = type == DSO_KV_F32 ? 1e-5 : 2e-2;
      if (!check(std::fabs(got[h * kValue + i] - want) <= bound,
                 "%s %s: %zu of %d tokens, window %d+%d: head %d [%d] is %g, not %g", v.name.c_str(), kv_name(type),
                 tokens.size(), c.context + row + 1, c.window, c.sinks, h, i, got[h * kValue + i], want))
        return;
    }
  }
}

void long_context(const Variant& v, int32_t type, const Case& c, Random& random) {
  const int32_t tokens = c.context + c.rows, blocks = (tokens + 31) / 32;
  dso_cache cache(*v.kernels, {type, 1, 0, 0, c.rank, kRope, 0, 0, nullptr}, blocks);
  std::vector<int32_t> table;
  for (int32_t i = 0; i < blocks; ++i) table.push_back(i);
  random.shuffle(table);
  const std::vector<float> x = normal((size_t)tokens * (size_t)c.latent(), 0.8f, random),
                           q = normal((size_t)c.rows * (size_t)c.query(), 0.8f, random);
  for (int32_t t = 0; t < tokens; t += 32)
    v.kernels->latent_write(cache.layout(0), cache.view(0, table.data()), t, std::min(32, tokens - t),
                            x.data() + (int64_t)t * c.latent(), 4 * c.latent());
  std::vector<float> latents((size_t)tokens * (size_t)c.latent());
  cache.read(0, table.data(), tokens, latents.data(), nullptr);

  Plan one(c, *v.kernels, 1, 7), many(c, *v.kernels, 2 + random.below(6), 7);
  const std::vector<float> together = many.run(cache, table, q, 0, c.rows);
  const std::string name = v.name + " " + kv_name(type) + " [" + std::to_string(c.heads) + ", " + std::to_string(c.rank) +
                           "] window " + std::to_string(c.window) + "+" + std::to_string(c.sinks);
  for (int32_t r = 0; r < c.rows; r += 1 + c.rows / 3) {
    against_doubles(v, c, type, many, r, q.data() + (int64_t)r * c.query(), latents, together.data() + (int64_t)r * c.out());
    const float* want = together.data() + (int64_t)r * c.out();
    for (Plan* p : {&one, &many})
      for (int32_t sequences : {1, 3}) {
        const std::vector<float> got = p->run(cache, table, q, r, 1, sequences);
        check(!memcmp(got.data() + (sequences - 1) * c.out(), want, 4 * (size_t)c.out()),
              "%s: row %d of %d after %d differs in %d sequences of one row", name.c_str(), r, c.rows, c.context, sequences);
      }
  }
}

}  // namespace

int main() {
  Random random(31);
  for (int i = 0; i < rounds(60); ++i) pieces(random);
  for (const Variant& v : vector_variants())
    for (int32_t type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      long_context(v, type, {3, 18, 0, 0, 20000 + random.below(700), 9}, random);
      long_context(v, type, {3, 18, 9000, 8300, 20000 + random.below(700), 9}, random);
      long_context(v, type, {17, 6, 8500, 4, 8502, 6}, random);  // the first rows see all
      if (type == DSO_KV_BF16)
        long_context(v, type, {128, 16, 0, 0, 8500, 70}, random);  // more parts than all pieces may fill: whole groups
    }
  return report("test_mla_long");
}
