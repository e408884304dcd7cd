// Sparse latent attention through plans, with tokens chosen by the test: against softmax over those tokens in double; tokens
// that were not chosen are never read; and if the chosen tokens are all that another row sees, the bits are that row's.
#include <algorithm>
#include <memory>
#include <set>

#include "cache.hpp"
#include "plan_parts.hpp"

namespace {

constexpr int32_t kHeads = 20, kNope = 6, kRope = 4, kRank = 34, kValue = 10;
constexpr int32_t kQuery = kHeads * (kNope + kRope), kLatent = kRank + kRope, kOut = kHeads * kValue;
constexpr float kScale = 0.3f;

struct Row {
  std::vector<float> q, latent, chosen;
};

// Rows contain q, latent and chosen tokens side by side, passed as embeddings and separated by products with ones and zeros.
class Plan {
 public:
  Plan(const Kernels& kernels, int32_t type, int32_t top_k, int threads)
      : top_k(top_k),
        width_(kQuery + kLatent + std::max(1, top_k)),
        context_{std::make_shared<Context>(kernels, threads)},
        cache(kernels, {type, 1, 0, 0, kRank, kRope, 0, 0, nullptr}, 128) {
    Random random(9);
    const int32_t widths[] = {kQuery, kLatent, std::max(1, top_k)};
    for (int i = 0, from = 0; i < 3; from += widths[i++]) {
      std::vector<float> part((size_t)widths[i] * width_, 0.0f);
      for (int32_t r = 0; r < widths[i]; ++r) part[(size_t)r * width_ + from + r] = 1;
      stack(part, 1, widths[i], width_);
    }
    keys = normal(kHeads * kRank * kNope, 0.5f, random);
    values = normal(kHeads * kValue * kRank, 0.5f, random);
    stack(keys, kHeads, kRank, kNope);
    stack(values, kHeads, kValue, kRank);
    stack(normal(kHeads * (kNope + kValue) * kRank, 0.5f, random), 1, kHeads * (kNope + kValue),
          kRank);                                                   // of expanded rows: there are none
    stack(std::vector<float>((size_t)width_, 0.0f), 1, 1, width_);  // the embedding
    for (int32_t w : {width_, kQuery, kLatent, widths[2], kHeads * kLatent, kHeads * kRank, kOut, kOut})
      slots_.push_back({DSO_SLOT_F32, w, 0, 0});
    step(DSO_OP_EMBEDDING, {}, {0}, {6});
    step(DSO_OP_LINEAR, {0}, {1, 2, 3}, {0, 1, 2});
    step(DSO_OP_LATENT_WRITE, {2}, {}, {});
    step(DSO_OP_MLA_ABSORB, {1}, {4}, {3});
    step(DSO_OP_MLA_ATTENTION, top_k > 0 ? std::vector<int32_t>{1, 4, 3} : std::vector<int32_t>{1, 4}, {5, 6}, {5});
    step(DSO_OP_MLA_VALUE, {5, 6}, {7}, {4});
    step(DSO_OP_HIDDEN_OUT, {7}, {}, {});
    check(dso_plan_create(&context_, steps_.data(), (int32_t)steps_.size(), slots_.data(), (int32_t)slots_.size(),
                          weights_.data(), (int32_t)weights_.size(), 1, &plan_) == 0,
          "plan: %s", dso_last_error());
    for (int32_t i = 0; i < 128; ++i) table.push_back((i * 37 + 11) % 128);
  }
  ~Plan() { dso_plan_destroy(plan_); }
  Plan(const Plan&) = delete;

  // Rows of one sequence in decode phase, after `context` tokens: [rows, heads * v_dim].
  std::vector<float> run(int32_t context, const std::vector<Row>& rows) {
    std::vector<float> x, out(rows.size() * kOut, NAN);
    for (const Row& r : rows) {
      x.insert(x.end(), r.q.begin(), r.q.end());
      x.insert(x.end(), r.latent.begin(), r.latent.end());
      std::vector<float> chosen = r.chosen;
      chosen.resize((size_t)std::max(1, top_k), -1.0f);
      x.insert(x.end(), chosen.begin(), chosen.end());
    }
    const int32_t n = (int32_t)rows.size(), phase = DSO_PHASE_DECODE;
    dso_batch b{};
    b.T = n;
    b.S = 1;
    b.max_blocks = 128;
    b.query_len = &n;
    b.context_len = &context;
    b.phase = &phase;
    b.block_table = table.data();
    b.inputs_embeds = x.data();
    b.hidden = out.data();
    b.cache = &cache;
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    return out;
  }
  uint8_t* latent_row(int64_t token) {
    return cache.view(0, table.data()).base + table[(size_t)token / 32] * cache.block_bytes() +
           token % 32 * cache.layout(0).row_bytes;
  }

  const int32_t top_k;
  std::vector<float> keys, values;  // [heads, rank, nope], [heads, v_dim, rank]
  std::vector<int32_t> table;

 private:
  const int32_t width_;
  dso_context context_;

 public:
  dso_cache cache;

 private:
  void stack(const std::vector<float>& w, int32_t count, int32_t rows, int32_t cols) {
    weights_.push_back(packed_weight(&context_, DSO_F32, w, count, rows, cols, packed_));
  }
  void step(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out, const std::vector<int32_t>& w) {
    dso_step s = step_of(op, in, out, w);
    s.heads = kHeads;
    s.nope = kNope;
    s.rope = kRope;
    s.rank = kRank;
    s.v_dim = kValue;
    s.top_k = top_k;
    s.scale = op == DSO_OP_MLA_ATTENTION ? kScale : 1;
    steps_.push_back(s);
  }

  std::vector<std::unique_ptr<Buffer>> packed_;
  std::vector<dso_weight> weights_;
  std::vector<dso_slot> slots_;
  std::vector<dso_step> steps_;
  dso_plan* plan_ = nullptr;
};

Row random_row(Random& random) { return {normal(kQuery, 0.5f, random), normal(kLatent, 0.5f, random), {}}; }

std::vector<float> random_choice(int64_t count, int64_t of, Random& random) {
  std::set<int> chosen;
  while ((int64_t)chosen.size() < count) chosen.insert(random.below((int)of));
  return {chosen.begin(), chosen.end()};
}

void against_doubles(const Variant& v, Plan& p, const Row& row, const std::vector<float>& latents, const float* got) {
  const int type = p.cache.layout(0).type;
  for (int64_t h = 0; h < kHeads; ++h) {
    std::vector<double> q(kLatent), logit, mixed(kRank);
    for (int64_t i = 0; i < kRank; ++i)
      for (int64_t j = 0; j < kNope; ++j)
        q[(size_t)i] += (double)p.keys[(size_t)((h * kRank + i) * kNope + j)] * row.q[(size_t)(h * (kNope + kRope) + j)];
    for (int64_t i = 0; i < kRope; ++i) q[(size_t)(kRank + i)] = row.q[(size_t)(h * (kNope + kRope) + kNope + i)];
    double top = -INFINITY, total = 0, largest = 0;
    for (float t : row.chosen) {
      double x = 0;
      for (int64_t i = 0; i < kLatent; ++i) x += kScale * q[(size_t)i] * latents[(size_t)t * kLatent + (size_t)i];
      logit.push_back(x);
      top = std::max(top, x);
    }
    for (size_t t = 0; t < logit.size(); ++t) {
      const double weight = std::exp(logit[t] - top);
      total += weight;
      for (int64_t i = 0; i < kRank; ++i) mixed[(size_t)i] += weight * latents[(size_t)row.chosen[t] * kLatent + (size_t)i];
    }
    std::vector<double> want(kValue);
    for (int64_t i = 0; i < kValue; ++i) {
      for (int64_t j = 0; j < kRank; ++j)
        want[(size_t)i] += p.values[(size_t)((h * kValue + i) * kRank + j)] * mixed[(size_t)j] / total;
      largest = std::max(largest, std::fabs(want[(size_t)i]));
    }
    const double bound = (type == DSO_KV_F32 ? 1e-5 : 3e-2) * std::max(0.1, largest);
    for (int64_t i = 0; i < kValue; ++i)
      if (!check(std::fabs(got[h * kValue + i] - want[(size_t)i]) <= bound, "%s kv %d, top_k %d: head %ld [%ld] is %g, not %g",
                 v.name.c_str(), type, p.top_k, (long)h, (long)i, got[h * kValue + i], want[(size_t)i]))
        return;
  }
}

void sparse(const Variant& v, int32_t type, int32_t top_k, int threads, Random& random) {
  const int32_t context = top_k + 1 + random.below(900);
  Plan p(*v.kernels, type, top_k, threads);
  std::vector<Row> rows((size_t)context);
  for (Row& r : rows) {
    r = random_row(random);
    r.chosen.assign(1, 0.0f);
  }
  p.run(0, rows);
  std::vector<Row> asked(1 + (size_t)random.below(5));
  for (Row& r : asked) {
    r = random_row(random);
    r.chosen = random_choice(top_k, context, random);
  }
  const std::vector<float> together = p.run(context, asked);
  std::vector<float> latents((size_t)context * kLatent);
  p.cache.read(0, p.table.data(), context, latents.data(), nullptr);
  std::set<float> read;
  for (size_t i = 0; i < asked.size(); ++i) {
    against_doubles(v, p, asked[i], latents, together.data() + i * kOut);
    read.insert(asked[i].chosen.begin(), asked[i].chosen.end());
  }
  // Alone, in a separate step, and with NaN in all tokens that were not chosen.
  for (int64_t t = 0; t < context; ++t)
    if (!read.count((float)t)) memset(p.latent_row(t), 0xff, (size_t)p.cache.layout(0).row_bytes);
  for (size_t i = 0; i < asked.size(); ++i) {
    const std::vector<float> alone = p.run(context + (int32_t)i, {asked[i]});
    check(!memcmp(alone.data(), together.data() + i * kOut, kOut * 4),
          "%s kv %d, top_k %d: row %zu of %zu differs alone, or reads what it did not choose", v.name.c_str(), type, top_k, i,
          asked.size());
  }
  // No index leads outside the sequence.
  Row wild = random_row(random);
  wild.chosen.assign((size_t)top_k, 0);
  for (float& t : wild.chosen) t = random.below(2) ? 3e9f : -5.0f;
  p.run(context, {wild});
}

// The first top_k tokens, chosen by a later row, are those visible to the last of them.
void equals_dense(const Variant& v, int32_t type, int32_t top_k, int threads, Random& random) {
  Plan dense(*v.kernels, type, 0, threads), p(*v.kernels, type, top_k, threads);
  std::vector<Row> rows((size_t)top_k);
  for (Row& r : rows) r = random_row(random);
  const std::vector<float> seen = dense.run(0, rows), also = p.run(0, rows);
  check(seen == also, "%s kv %d: rows that see no more than top_k %d differ from dense ones", v.name.c_str(), type, top_k);
  Row behind = random_row(random);
  behind.q = rows.back().q;
  for (int32_t t = 0; t < top_k; ++t) behind.chosen.push_back((float)t);
  const std::vector<float> got = p.run(top_k, {behind});
  check(!memcmp(got.data(), seen.data() + (size_t)(top_k - 1) * kOut, kOut * 4),
        "%s kv %d: all of top_k %d tokens chosen differ from dense", v.name.c_str(), type, top_k);
}

}  // namespace

int main() {
  Random random(8);
  for (const Variant& v : variants())
    for (int32_t type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4})
      for (int32_t top_k : {1, 31, 256, 300, 700}) {
        sparse(v, type, top_k, 1 + random.below(4), random);
        equals_dense(v, type, top_k, 1 + random.below(4), random);
      }
  return report("test_sparse");
}
