// Block choice for latent caches on every variant: summaries against the rows in the cache, choices against estimates in
// double; the same choice alone and in a batch, with any number of threads.
#include <algorithm>
#include <memory>

#include "choice_fixture.hpp"
#include "cache.hpp"
#include "latent_fixture.hpp"
#include "plan_parts.hpp"

namespace {

struct Spec {
  int32_t type, heads, rank, rope, top_k, window, sinks;
  int32_t width() const { return rank + rope; }
  int32_t q_width() const { return heads * width(); }
  int32_t row_width() const { return q_width() + width(); }
  int32_t chosen() const { return 32 * top_k; }
};

constexpr int32_t kBlocks = 200;

struct Sequence {
  std::vector<float> rows;  // absorbed queries and the latent of each token
  int32_t done = 0;
  std::vector<int32_t> table = std::vector<int32_t>(kBlocks, 0);
  std::vector<std::vector<float>> chosen;  // of each token
};

// Rows contain queries and latent side by side, passed as embeddings and separated by products with ones and zeros.
class Model {
 public:
  Model(const Spec& s, const Variant& v, int threads, Random& random)
      : spec(s),
        isa(v.name),
        context(*v.kernels, threads),
        cache(*v.kernels, {s.type, 2, 0, 0, s.rank, s.rope, 0, 1, nullptr}, kBlocks) {
    const int32_t widths[] = {s.q_width(), s.width()};
    for (int i = 0, from = 0; i < 2; from += widths[i++]) {
      std::vector<float> part((size_t)widths[i] * (size_t)s.row_width(), 0.0f);
      for (int32_t r = 0; r < widths[i]; ++r) part[(size_t)r * (size_t)s.row_width() + (size_t)(from + r)] = 1;
      weights_.push_back(packed_weight(context.c, DSO_F32, part, 0, widths[i], s.row_width(), packed_));
    }
    weights_.push_back(
        packed_weight(context.c, DSO_F32, std::vector<float>((size_t)s.row_width(), 0.0f), 0, 1, s.row_width(), packed_));
    for (int32_t w : {s.row_width(), s.q_width(), s.width(), s.chosen()}) slots_.push_back({DSO_SLOT_F32, w, 0, 0});
    step(DSO_OP_EMBEDDING, {}, {0}, {2});
    step(DSO_OP_LINEAR, {0}, {1, 2}, {0, 1});
    step(DSO_OP_LATENT_WRITE, {2}, {}, {}).layer = 1;
    dso_step& choose = step(DSO_OP_LATENT_CHOOSE, {1}, {3}, {});
    choose.layer = 1;
    choose.top_k = s.top_k;
    choose.window = s.window;
    choose.sinks = s.sinks;
    step(DSO_OP_HIDDEN_OUT, {3}, {}, {});
    check(dso_plan_create(context.c, steps_.data(), (int32_t)steps_.size(), slots_.data(), (int32_t)slots_.size(),
                          weights_.data(), (int32_t)weights_.size(), 1, &plan_) == 0,
          "plan: %s", dso_last_error());
    for (int32_t i = 0; i < kBlocks; ++i) free_.push_back(kBlocks - 1 - i);
    if (random.below(2)) random.shuffle(free_);
  }
  ~Model() { dso_plan_destroy(plan_); }
  Model(const Model&) = delete;

  struct Part {
    Sequence* sequence;
    int32_t rows, phase;
  };
  void feed(const std::vector<Part>& parts) {
    std::vector<float> x;
    std::vector<int32_t> query, past, phase, table;
    for (const Part& p : parts) {
      Sequence& s = *p.sequence;
      for (int32_t b = (s.done + 31) / 32; b * 32 < s.done + p.rows; ++b, free_.pop_back()) s.table[(size_t)b] = free_.back();
      x.insert(x.end(), s.rows.begin() + (long)s.done * spec.row_width(),
               s.rows.begin() + (long)(s.done + p.rows) * spec.row_width());
      query.push_back(p.rows);
      past.push_back(s.done);
      phase.push_back(p.phase);
      table.insert(table.end(), s.table.begin(), s.table.end());
    }
    const size_t T = x.size() / (size_t)spec.row_width();
    std::vector<float> hidden(T * (size_t)spec.chosen(), NAN);
    dso_batch b{};
    b.T = (int32_t)T;
    b.S = (int32_t)parts.size();
    b.max_blocks = kBlocks;
    b.query_len = query.data();
    b.context_len = past.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.inputs_embeds = x.data();
    b.hidden = hidden.data();
    b.cache = &cache;
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    auto row = hidden.begin();
    for (const Part& p : parts) {
      for (int32_t i = 0; i < p.rows; ++i, row += spec.chosen()) p.sequence->chosen.emplace_back(row, row + spec.chosen());
      p.sequence->done += p.rows;
    }
  }
  std::vector<float> held(const Sequence& s) {  // latents as read from the cache
    std::vector<float> x((size_t)s.done * (size_t)spec.width());
    check(dso_cache_read(&cache, 1, s.table.data(), s.done, x.data(), nullptr) == 0, "%s", dso_last_error());
    return x;
  }

  const Spec spec;
  const std::string isa;
  OwnContext context;
  dso_cache cache;

 private:
  dso_step& step(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out, const std::vector<int32_t>& w) {
    steps_.push_back(step_of(op, in, out, w));
    steps_.back().heads = spec.heads;
    steps_.back().rank = spec.rank;
    steps_.back().rope = spec.rope;
    return steps_.back();
  }
  std::vector<std::unique_ptr<Buffer>> packed_;
  std::vector<dso_weight> weights_;
  std::vector<dso_slot> slots_;
  std::vector<dso_step> steps_;
  std::vector<int32_t> free_;
  dso_plan* plan_ = nullptr;
};

struct Extremes {
  std::vector<float> largest, smallest;  // [blocks, width]
  Extremes(const Spec& s, const std::vector<float>& latents) {
    const size_t w = (size_t)s.width();
    for (size_t b = 0; b < latents.size() / w / 32; ++b)
      for (size_t i = 0; i < w; ++i) {
        float high = -INFINITY, low = INFINITY;
        for (size_t t = 32 * b; t < 32 * b + 32; ++t)
          high = std::max(high, latents[t * w + i]), low = std::min(low, latents[t * w + i]);
        largest.push_back(s.type == DSO_KV_F32 ? high : rounded_bf16(high));
        smallest.push_back(s.type == DSO_KV_F32 ? low : rounded_bf16(low));
      }
  }
};

void summaries_hold(Model& m, const Sequence& s, const char* what) {
  const Spec& c = m.spec;
  const Extremes want(c, m.held(s));
  const KvView v = m.cache.view(1, s.table.data());
  for (int64_t b = 0; b < s.done / 32; ++b)
    for (int64_t i = 0; i < c.width(); ++i)
      for (bool smallest : {false, true}) {
        const int64_t block = s.table[(size_t)b];
        const uint8_t* panel =
            v.summaries + block / 32 * v.summary_stride + (smallest ? m.cache.layout(0).summary_bytes / 2 : 0);
        const float got = c.type == DSO_KV_F32
                              ? ((const float*)panel)[i * 32 + block % 32]
                              : from_bits((uint32_t)((const uint16_t*)panel)[i / 2 * 64 + block % 32 * 2 + i % 2] << 16);
        const float right = (smallest ? want.smallest : want.largest)[(size_t)(b * c.width() + i)];
        if (!check(got == right, "%s %s %s: rank=%d rope=%d block %ld number %ld: %s is %g, not %g", m.isa.c_str(),
                   kv_name(c.type), what, c.rank, c.rope, (long)b, (long)i, smallest ? "smallest" : "largest", got, right))
          return;
      }
}

// Whether a row's tokens match the definition, except for estimates that differ less than rounding.
bool good_choice(const Model& m, const Extremes& x, const Sequence& s, int64_t token) {
  const Spec& c = m.spec;
  const int64_t n = token / 32 + 1, S = (c.sinks + 31) / 32, W = std::max<int64_t>(0, token + 1 - c.window) / 32;
  const std::vector<float>& got = s.chosen[(size_t)token];
  std::vector<char> chosen((size_t)n);
  const int64_t blocks = std::min<int64_t>(n, c.top_k), count = (blocks - 1) * 32 + token % 32 + 1;
  for (int64_t i = 0; i < c.chosen(); ++i) {
    if (i >= count) {
      if (got[(size_t)i] != -1) return false;
    } else {
      if (!(got[(size_t)i] >= 0 && got[(size_t)i] <= (float)token) || (int64_t)got[(size_t)i] % 32 != i % 32 ||
          (i > 0 && got[(size_t)i] <= got[(size_t)i - 1]))
        return false;
      chosen[(size_t)got[(size_t)i] / 32] = 1;
    }
  }
  if (std::count(chosen.begin(), chosen.end(), 1) != blocks) return false;
  if (n <= c.top_k) return true;
  const bool rounds_q = c.type != DSO_KV_F32 && has_dot_bf16(m.isa);
  return best_are_chosen(chosen, S, W, s.rows.data() + token * c.row_width(), c.heads, c.width(), x.largest.data(),
                         x.smallest.data(), rounds_q ? 0x1p-8 : 2e-6);
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * 4);
}

void company(const Variant& v, const Spec& spec, Random& random) {
  const std::string name = v.name + " " + kv_name(spec.type) + " [" + std::to_string(spec.heads) + ", " +
                           std::to_string(spec.rank) + "+" + std::to_string(spec.rope) + "] top_k " +
                           std::to_string(spec.top_k) + " window " + std::to_string(spec.window) + "+" +
                           std::to_string(spec.sinks);
  const int32_t totals[] = {32 * (spec.top_k + 6) + 1 + random.below(700), 1 + random.below(32 * spec.top_k)};
  Model one(spec, v, 1, random), many(spec, v, 2 + random.below(5), random);
  for (int32_t total : totals) {
    Sequence alone, mixed, other;
    alone.rows = normal((size_t)total * (size_t)spec.row_width(), 0.8f, random);
    mixed.rows = alone.rows;
    other.rows = normal(40 * (size_t)spec.row_width(), 0.8f, random);
    one.feed({{&alone, total, DSO_PHASE_PREFILL}});
    while (mixed.done < total) {
      const int32_t rows =
          std::min(total - mixed.done, random.below(4) == 0 ? 1 : 1 + random.below(mixed.done == 0 ? total : 60));
      if (rows > 1 && other.done < 40)
        many.feed({{&other, 1, DSO_PHASE_DECODE}, {&mixed, rows, DSO_PHASE_PREFILL}});
      else
        many.feed({{&mixed, rows, DSO_PHASE_DECODE}});
    }
    summaries_hold(one, alone, "at once");
    summaries_hold(many, mixed, "in pieces");
    const Extremes extremes(spec, one.held(alone));
    for (int32_t t = 0; t < total; ++t) {
      if (!check(equal(alone.chosen[(size_t)t], mixed.chosen[(size_t)t]), "%s: choice of token %d of %d differs in a batch",
                 name.c_str(), t, total))
        break;
      if (t % 5 == 0 && !check(good_choice(one, extremes, alone, t), "%s: choice of token %d of %d", name.c_str(), t, total))
        break;
    }
  }
}

void turned(const Variant& v, int32_t type, Random& random) {
  Model m({type, 2, 2 * (1 + random.below(150)), 4, 6, 20, 3}, v, 2, random);
  Sequence s, copy;
  s.rows = normal(75 * (size_t)m.spec.row_width(), 1, random);
  m.feed({{&s, 75, DSO_PHASE_PREFILL}});
  copy.done = 75;
  for (int32_t b = 0, to = 0; b < 3; ++to) {
    if (std::find(s.table.begin(), s.table.begin() + 3, to) != s.table.begin() + 3) continue;
    copy.table[(size_t)b] = to;
    check(dso_cache_copy_block(&m.cache, s.table[(size_t)b++], to) == 0, "%s", dso_last_error());
  }
  summaries_hold(m, copy, "as copied");
  const std::vector<float> frequencies = {0.3f, 0.01f};
  const dso_rotation turn = {frequencies.data(), 4, 0, 0, 0};
  check(dso_cache_rotate(m.context.c, &m.cache, &turn, nullptr, 0, copy.table.data(), 75, 50, -20) == 0, "%s",
        dso_last_error());
  summaries_hold(m, copy, "after rotation");
  summaries_hold(m, s, "of the sequence that was not rotated");
}

void refusals(const Variant& v) {
  OwnContext context(*v.kernels, 1);
  auto refused = [&](const char* words, int32_t rank, int32_t top_k, int32_t sinks) {
    const int32_t q = 2 * (rank + 4);
    const std::vector<float> zero((size_t)q);
    std::vector<std::unique_ptr<Buffer>> keep;
    const dso_weight w = packed_weight(context.c, DSO_F32, zero, 0, 1, q, keep);
    const dso_slot slots[] = {{DSO_SLOT_F32, q, 0, 0}, {DSO_SLOT_F32, 32 * std::max(1, top_k), 0, 0}};
    dso_step steps[] = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0}), step_of(DSO_OP_LATENT_CHOOSE, {0}, {1}, {})};
    steps[1].heads = 2, steps[1].rank = rank, steps[1].rope = 4, steps[1].top_k = top_k, steps[1].window = 64,
    steps[1].sinks = sinks;
    dso_plan* plan = nullptr;
    const bool made = dso_plan_create(context.c, steps, 2, slots, 2, &w, 1, 1, &plan) == 0;
    check(!made && strstr(dso_last_error(), words), "expected \"%s\", got \"%s\"", words, made ? "a plan" : dso_last_error());
    dso_plan_destroy(plan);
  };
  refused("estimates support at most 3840", 3840, 8, 0);
  refused("top_k is 4, must exceed the 4 blocks", 30, 4, 1);
  refused("top_k is 0", 30, 0, 0);
}

}  // namespace

int main() {
  Random random(41);
  refusals(variants().back());
  for (const Variant& v : vector_variants())
    for (int32_t type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      company(v, {type, 5, 34, 6, 6, 40, 5}, random);
      company(v, {type, 1, 130, 2, 9, 100, 0}, random);
      company(v, {type, 17, 6, 4, 5, 1, 64}, random);
      company(v, {type, 2, 600, 30, 5, 32, 1}, random);  // more than a slice of numbers
      turned(v, type, random);
    }
  return report("test_latent_choose");
}
