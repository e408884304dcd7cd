// Block-sparse attention on every variant: summaries against the keys in the cache, choices against estimates in double,
// attention against softmax over the chosen blocks. A row's bits must depend only on the row and the tokens it sees.
#include <algorithm>
#include <memory>
#include <numbers>

#include "choice_fixture.hpp"
#include "cache.hpp"
#include "int4_rows.hpp"
#include "plan_parts.hpp"

namespace {

struct Spec {
  int32_t type, kv_heads, group, head_dim, top_k, window, sinks;
  int32_t heads() const { return kv_heads * group; }
  int32_t q_width() const { return heads() * head_dim; }
  int32_t kv_width() const { return kv_heads * head_dim; }
  int32_t row_width() const { return q_width() + 2 * kv_width(); }
  float scale() const { return 1.5f / std::sqrt((float)head_dim); }
};

struct Sequence {
  std::vector<float> rows;  // q, k, v of each token
  int32_t done = 0;
  std::vector<int32_t> blocks;
  std::vector<std::vector<float>> chosen, out;  // of each token
};

constexpr int32_t kBlocks = 400;

// Rows contain q, k and v side by side, passed as embeddings and separated by products with ones and zeros.
class Model {
 public:
  Model(const Spec& s, const Variant& v, int threads, bool sparse, Random& random)
      : spec(s),
        isa(v.name),
        chosen_width_(sparse ? s.kv_heads * s.top_k : 0),
        context_(*v.kernels, threads),
        cache(*v.kernels, {s.type, 1, s.kv_heads, s.head_dim, 0, 0, 0, 1, nullptr}, kBlocks) {
    const int32_t widths[] = {s.q_width(), s.kv_width(), s.kv_width()};
    for (int i = 0, from = 0; i < 3; from += widths[i++]) {
      std::vector<float> part((size_t)widths[i] * s.row_width(), 0.0f);
      for (int32_t r = 0; r < widths[i]; ++r) part[(size_t)r * s.row_width() + from + r] = 1;
      weights_.push_back(packed_weight(context_.c, DSO_F32, part, 0, widths[i], s.row_width(), packed_));
    }
    weights_.push_back(
        packed_weight(context_.c, DSO_F32, std::vector<float>((size_t)s.row_width(), 0.0f), 0, 1, s.row_width(), packed_));
    for (int32_t w : {s.row_width(), s.q_width(), s.kv_width(), s.kv_width(), s.q_width(), s.kv_heads * s.top_k})
      slots_.push_back({DSO_SLOT_F32, w, 0, 0});
    step(DSO_OP_EMBEDDING, {}, {0}, {3});
    step(DSO_OP_LINEAR, {0}, {1, 2, 3}, {0, 1, 2});
    step(DSO_OP_CACHE_WRITE, {2, 3}, {});
    if (sparse) {
      dso_step& choose = step(DSO_OP_BLOCK_CHOOSE, {1}, {5});
      choose.top_k = s.top_k;
      choose.window = s.window;
      choose.sinks = s.sinks;
      step(DSO_OP_ATTENTION, {1, 5}, {4}).top_k = s.top_k;
      step(DSO_OP_HIDDEN_OUT, {5}, {});
    } else {
      step(DSO_OP_ATTENTION, {1}, {4});
    }
    step(DSO_OP_HIDDEN_OUT, {4}, {}).layer = (chosen_width_ + s.q_width() - 1) / s.q_width();
    check(dso_plan_create(context_.c, steps_.data(), (int32_t)steps_.size(), slots_.data(), (int32_t)slots_.size(),
                          weights_.data(), (int32_t)weights_.size(), 1, &plan_) == 0,
          "plan: %s", dso_last_error());
    for (int32_t i = 0; i < kBlocks; ++i) free_.push_back(kBlocks - 1 - i);
    const int runs = 1 + random.below(40);  // blocks of a sequence are adjacent, or scattered
    for (int i = 0; i < runs; ++i) std::swap(free_[(size_t)random.below(kBlocks)], free_[(size_t)random.below(kBlocks)]);
    if (random.below(3) == 0) random.shuffle(free_);
  }
  ~Model() { dso_plan_destroy(plan_); }
  Model(const Model&) = delete;

  struct Part {
    Sequence* sequence;
    int32_t rows, phase;
  };
  void feed(const std::vector<Part>& parts) {
    std::vector<float> x;
    std::vector<int32_t> query, context, phase, table;
    for (const Part& p : parts) {
      Sequence& s = *p.sequence;
      for (; (int32_t)s.blocks.size() * 32 < s.done + p.rows; free_.pop_back()) s.blocks.push_back(free_.back());
      x.insert(x.end(), s.rows.begin() + (long)s.done * spec.row_width(),
               s.rows.begin() + (long)(s.done + p.rows) * spec.row_width());
      query.push_back(p.rows);
      context.push_back(s.done);
      phase.push_back(p.phase);
      table.resize(query.size() * kBlocks, -7);
      std::copy(s.blocks.begin(), s.blocks.end(), table.end() - kBlocks);
    }
    const size_t T = x.size() / (size_t)spec.row_width(), q = (size_t)spec.q_width(), c = (size_t)chosen_width_,
                 at = (c + q - 1) / q * q * T;
    std::vector<float> hidden(at + q * T, NAN);
    dso_batch b{};
    b.T = (int32_t)T;
    b.S = (int32_t)parts.size();
    b.max_blocks = kBlocks;
    b.query_len = query.data();
    b.context_len = context.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.inputs_embeds = x.data();
    b.hidden = hidden.data();
    b.cache = &cache;
    check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error());
    size_t row = 0;
    for (const Part& p : parts) {
      for (int32_t i = 0; i < p.rows; ++i, ++row) {
        p.sequence->chosen.emplace_back(hidden.begin() + (long)(row * c), hidden.begin() + (long)((row + 1) * c));
        p.sequence->out.emplace_back(hidden.begin() + (long)(at + row * q), hidden.begin() + (long)(at + (row + 1) * q));
      }
      p.sequence->done += p.rows;
    }
  }

  const Spec spec;
  const std::string isa;

 private:
  dso_step& step(int32_t op, const std::vector<int32_t>& in, const std::vector<int32_t>& out,
                 const std::vector<int32_t>& w = {}) {
    steps_.push_back(step_of(op, in, out, w));
    dso_step& s = steps_.back();
    s.heads = spec.heads();
    s.kv_heads = spec.kv_heads;
    s.head_dim = spec.head_dim;
    if (op == DSO_OP_ATTENTION) s.scale = spec.scale();
    return s;
  }
  const int32_t chosen_width_;
  OwnContext context_;
  std::vector<std::unique_ptr<Buffer>> packed_;
  std::vector<dso_weight> weights_;
  std::vector<dso_slot> slots_;
  std::vector<dso_step> steps_;
  dso_plan* plan_ = nullptr;
  std::vector<int32_t> free_;

 public:
  dso_cache cache;
};

bool rounds_q(const Model& m) { return m.spec.type != DSO_KV_F32 && has_dot_bf16(m.isa); }

// A layer of a sequence as stored in the cache, and for each full block and kv head the maxima and minima of the keys.
struct Held {
  std::vector<float> keys, values, largest, smallest;  // [kv_heads, tokens, head_dim]; [kv_heads, blocks, head_dim]
  int64_t tokens, blocks;

  Held(Model& m, const Sequence& s) : tokens(s.done), blocks(s.done / 32) {
    const int64_t d = m.spec.head_dim;
    keys.resize((size_t)(m.spec.kv_width() * tokens));
    values = keys;
    check(dso_cache_read(&m.cache, 0, s.blocks.data(), (int32_t)tokens, keys.data(), values.data()) == 0, "%s",
          dso_last_error());
    for (int64_t h = 0; h < m.spec.kv_heads; ++h)
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < d; ++i) {
          float high = -INFINITY, low = INFINITY;
          for (int64_t t = 32 * b; t < 32 * b + 32; ++t) {
            high = std::max(high, keys[(size_t)((h * tokens + t) * d + i)]);
            low = std::min(low, keys[(size_t)((h * tokens + t) * d + i)]);
          }
          largest.push_back(m.spec.type == DSO_KV_F32 ? high : rounded_bf16(high));
          smallest.push_back(m.spec.type == DSO_KV_F32 ? low : rounded_bf16(low));
        }
  }
};

// Element i of a block's summary as stored in the cache.
float kept(const dso_cache& cache, int32_t block, int64_t kv_head, bool smallest, int64_t i, const int32_t* table) {
  const KvView v = cache.view(0, table);
  const uint8_t* panel = v.summaries + block / 32 * v.summary_stride + kv_head * cache.layout(0).summary_bytes +
                         (smallest ? cache.layout(0).summary_bytes / 2 : 0);
  if (cache.layout(0).type == DSO_KV_F32) return ((const float*)panel)[i * 32 + block % 32];
  return from_bits((uint32_t)((const uint16_t*)panel)[i / 2 * 64 + block % 32 * 2 + i % 2] << 16);
}

void summaries_hold(Model& m, const Sequence& s, const char* what) {
  const Held held(m, s);
  const int64_t d = m.spec.head_dim;
  for (int64_t h = 0; h < m.spec.kv_heads; ++h)
    for (int64_t b = 0; b < held.blocks; ++b)
      for (int64_t i = 0; i < d; ++i)
        for (bool smallest : {false, true}) {
          const float want = (smallest ? held.smallest : held.largest)[(size_t)((h * held.blocks + b) * d + i)];
          const float got = kept(m.cache, s.blocks[(size_t)b], h, smallest, i, s.blocks.data());
          if (!check(got == want, "%s %s %s: d=%ld block %ld head %ld number %ld: %s is %g, not %g", m.isa.c_str(),
                     kv_name(m.spec.type), what, (long)d, (long)b, (long)h, (long)i, smallest ? "smallest" : "largest", got,
                     want))
            return;
        }
}

// Whether the blocks chosen for a row and kv head match the definition, except for estimates that differ less than rounding.
bool good_choice(const Model& m, const Held& held, const Sequence& s, int64_t token, int64_t kv_head) {
  const Spec& c = m.spec;
  const int64_t n = token / 32 + 1, d = c.head_dim, S = (c.sinks + 31) / 32,
                W = std::max<int64_t>(0, token + 1 - c.window) / 32;
  const float* got = s.chosen[(size_t)token].data() + kv_head * c.top_k;
  std::vector<char> chosen((size_t)n);
  for (int64_t i = 0; i < c.top_k; ++i) {
    if (n <= c.top_k) {
      if (got[i] != (i < n ? (float)i : -1.0f)) return false;
      continue;
    }
    if (!(got[i] >= 0 && got[i] < (float)n && got[i] == std::floor(got[i])) || (i > 0 && got[i] <= got[i - 1])) return false;
    chosen[(size_t)got[i]] = 1;
  }
  if (n <= c.top_k) return true;
  const int64_t at = kv_head * held.blocks * d;
  return best_are_chosen(chosen, S, W, s.rows.data() + token * c.row_width() + kv_head * c.group * d, c.group, d,
                         held.largest.data() + at, held.smallest.data() + at, rounds_q(m) ? 0x1p-8 : 1e-6);
}

void against_doubles(Model& m, const Sequence& s) {
  const Spec& c = m.spec;
  const Held held(m, s);
  const int64_t d = c.head_dim;
  const bool transformed = c.type == DSO_KV_INT4;  // rounds transformed rows, and adds an ulp per step of a transform
  std::vector<float> keys = held.keys, values = held.values;
  if (transformed)
    for (int64_t at = 0; at < (int64_t)keys.size(); at += d)
      for (std::vector<float>* x : {&keys, &values}) hadamard(x->data() + at, d, false);
  for (int64_t t = 0; t < s.done; t += t > 100 && t + 20 < s.done ? 7 : 1)
    for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
      if (!check(good_choice(m, held, s, t, kv),
                 "%s %s: d=%ld group=%d top_k=%d window=%d sinks=%d: choice of token %ld of %d, kv head %ld", m.isa.c_str(),
                 kv_name(c.type), (long)d, c.group, c.top_k, c.window, c.sinks, (long)t, s.done, (long)kv))
        return;
      for (int64_t g = 0; g < c.group; ++g) {
        const int64_t h = kv * c.group + g;
        const float* row = s.rows.data() + t * c.row_width() + h * d;
        std::vector<float> q(row, row + d);
        if (transformed) hadamard(q.data(), d, true);
        double top = -INFINITY, size = 0, total = 0, largest = 0;
        std::vector<int64_t> seen;
        std::vector<double> logit, mixed((size_t)d);
        for (int64_t i = 0; i < c.top_k; ++i) {
          const float block = s.chosen[(size_t)t][(size_t)(kv * c.top_k + i)];
          for (int64_t u = 32 * (int64_t)block; block >= 0 && u < 32 * (int64_t)block + 32 && u <= t; ++u) seen.push_back(u);
        }
        for (int64_t u : seen) {
          double x = 0, a = 0;
          for (int64_t i = 0; i < d; ++i) {
            const double qi = rounds_q(m) ? rounded_bf16(q[(size_t)i] * (c.scale() * 1.44269504f)) * std::numbers::ln2
                                          : (double)q[(size_t)i] * c.scale();
            const double term = qi * keys[(size_t)((kv * held.tokens + u) * d + i)];
            x += term;
            a += std::fabs(term);
            largest = std::max(largest, (double)std::fabs(values[(size_t)((kv * held.tokens + u) * d + i)]));
          }
          logit.push_back(x);
          top = std::max(top, x);
          size = std::max(size, a);
        }
        for (size_t j = 0; j < seen.size(); ++j) {
          const double p = std::exp(logit[j] - top);
          total += p;
          for (int64_t i = 0; i < d; ++i) mixed[(size_t)i] += p * values[(size_t)((kv * held.tokens + seen[j]) * d + i)];
        }
        if (transformed) hadamard(mixed.data(), d, true);
        const double bound = largest * (1e-6 + (transformed ? 24 : 4) * 6e-8 * 2 * size + (rounds_q(m) ? 0x1p-8 : 0));
        for (int64_t i = 0; i < d; ++i) {
          const float got = s.out[(size_t)t][(size_t)(h * d + i)];
          if (!check(std::fabs(got - mixed[(size_t)i] / total) <= bound,
                     "%s %s: d=%ld group=%d top_k=%d token %ld head %ld [%ld]: %g, not %g", m.isa.c_str(), kv_name(c.type),
                     (long)d, c.group, c.top_k, (long)t, (long)h, (long)i, got, mixed[(size_t)i] / total))
            return;
        }
      }
    }
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// Each sequence alone on one thread with its prompt at once; then in random batches and chunks on several threads; and without
// a choice, where all blocks are chosen.
void company(const Spec& spec, const Variant& v, int threads, Random& random) {
  struct Life {
    int32_t prompt, total;
    Sequence alone, mixed, flash;
  };
  std::vector<Life> lives;
  for (int i = 0; i < 3; ++i) {
    const int32_t prompt = i == 0 ? 32 * (spec.top_k + 3) + random.below(400) : 1 + random.below(300),
                  total = prompt + 1 + random.below(40);
    std::vector<float> rows = normal((size_t)total * spec.row_width(), 1, random);
    lives.push_back({prompt, total, {}, {}, {}});
    for (Sequence* s : {&lives.back().alone, &lives.back().mixed, &lives.back().flash}) s->rows = rows;
  }
  Model one(spec, v, 1, true, random), full(spec, v, 2, false, random), many(spec, v, threads, true, random);
  for (Life& l : lives)
    for (auto [model, s] : {std::pair(&one, &l.alone), std::pair(&full, &l.flash)}) {
      model->feed({{s, l.prompt, DSO_PHASE_PREFILL}});
      while (s->done < l.total) model->feed({{s, 1, DSO_PHASE_DECODE}});
    }
  for (bool more = true; more;) {
    std::vector<Model::Part> parts, prefill;
    more = false;
    for (Life& l : lives) {
      const int32_t left = (l.mixed.done < l.prompt ? l.prompt : l.total) - l.mixed.done;
      if (l.mixed.done == l.total) continue;
      more = true;
      if (random.below(3) == 0) continue;
      if (l.mixed.done < l.prompt)
        prefill.push_back({&l.mixed, 1 + random.below(random.below(2) ? left : std::min(left, 40)), DSO_PHASE_PREFILL});
      else
        parts.push_back({&l.mixed, 1 + random.below(std::min(left, 4)), DSO_PHASE_DECODE});
    }
    parts.insert(parts.end(), prefill.begin(), prefill.end());
    if (!parts.empty()) many.feed(parts);
  }
  against_doubles(one, lives[0].alone);
  for (const Life& l : lives) {
    summaries_hold(many, l.mixed, "in pieces");
    for (int32_t t = 0; t < l.total; ++t) {
      if (!check(equal(l.alone.chosen[(size_t)t], l.mixed.chosen[(size_t)t]) &&
                     equal(l.alone.out[(size_t)t], l.mixed.out[(size_t)t]),
                 "%s %s, %d threads: d=%d group=%d top_k=%d: token %d of %d differs in a batch", v.name.c_str(),
                 kv_name(spec.type), threads, spec.head_dim, spec.group, spec.top_k, t, l.total))
        return;
      if (t < 32 * spec.top_k && !check(equal(l.alone.out[(size_t)t], l.flash.out[(size_t)t]),
                                        "%s %s: d=%d group=%d top_k=%d: token %d sees all, and differs from full attention",
                                        v.name.c_str(), kv_name(spec.type), spec.head_dim, spec.group, spec.top_k, t))
        return;
    }
  }
}

// Ties go to the earlier block; a block with a NaN is chosen; with infinities the results are still valid blocks.
void odd_numbers(const Variant& v, Random& random) {
  const Spec spec = {DSO_KV_F32, 2, 3, 10, 6, 20, 3};
  const int32_t total = 32 * 20 + 5;
  Model m(spec, v, 2, true, random);
  Sequence s;
  for (int32_t t = 0; t < total; ++t)
    for (int32_t i = 0; i < spec.row_width(); ++i) s.rows.push_back((float)(i % 7 - 3));
  m.feed({{&s, total - 4, DSO_PHASE_PREFILL}});
  for (int i = 0; i < spec.top_k; ++i) {
    const float want[] = {0, 1, 2, 3, 19, 20}, *got = s.chosen.back().data();  // token 640: its window begins in block 19
    check(got[i] == want[i] && got[spec.top_k + i] == want[i], "%s: block %d of equal ones is %g", v.name.c_str(), i, got[i]);
  }
  const std::vector<float> nan(10, NAN), infinity(10, INFINITY);
  const KvView view = m.cache.view(0, s.blocks.data());
  for (auto [block, x] : {std::pair(9, &nan), std::pair(12, &infinity), std::pair(13, &infinity)}) {
    m.cache.kernels.kv_write(m.cache.layout(0), view, 32 * block + 7, 1, x->data(), 40, x->data(), 40, 0, 1);
    m.cache.kernels.kv_summarize(m.cache.layout(0), view, block);
  }
  m.feed({{&s, 4, DSO_PHASE_DECODE}});
  for (size_t t = (size_t)total - 4; t < (size_t)total; ++t)
    for (size_t i = 0; i < s.chosen[t].size(); ++i) {
      const float block = s.chosen[t][i];
      check(block >= 0 && block <= 20 && (i % 6 == 0 || block > s.chosen[t][i - 1]), "%s: block %g among NaN and infinities",
            v.name.c_str(), block);
    }
}

// Copies, files and rotations keep the summaries correct; unused blocks release them.
void caches(const Variant& v, int type, Random& random) {
  const Spec spec = {type, 2, 2, 2 * (1 + random.below(60)), 4, 0, 0};
  Model m(spec, v, 2, true, random);
  Sequence s;
  s.rows = normal(75 * (size_t)spec.row_width(), 1, random);
  m.feed({{&s, 75, DSO_PHASE_PREFILL}});
  summaries_hold(m, s, "as written");

  std::vector<int32_t> others;
  for (int32_t b = 0; others.size() < 3; b += 97)
    if (std::find(s.blocks.begin(), s.blocks.end(), b) == s.blocks.end()) others.push_back(b);
  std::vector<uint8_t> bytes((size_t)dso_cache_saved_bytes(&m.cache));
  for (size_t i = 0; i < 3; ++i) {
    if (i == 1) {
      check(dso_cache_save_block(&m.cache, s.blocks[i], bytes.data()) == 0 &&
                dso_cache_load_block(&m.cache, others[i], bytes.data()) == 0,
            "%s", dso_last_error());
    } else {
      check(dso_cache_copy_block(&m.cache, s.blocks[i], others[i]) == 0, "%s", dso_last_error());
    }
  }
  Sequence copy = s;
  copy.blocks = others;
  summaries_hold(m, copy, "as copied");

  const std::vector<float> frequencies(1, 0.3f);
  const dso_rotation turn = {frequencies.data(), 2, 0, 0, 0};
  OwnContext context(*v.kernels, 2);
  check(dso_cache_rotate(context.c, &m.cache, &turn, nullptr, 0, copy.blocks.data(), 75, 50, -20) == 0, "%s", dso_last_error());
  summaries_hold(m, copy, "after rotation");
  summaries_hold(m, s, "of the sequence that was not rotated");

  const dso_cache_shape shape = {type, 1, spec.kv_heads, spec.head_dim, 0, 0, 0, 1, nullptr},
                        plain = {type, 1, spec.kv_heads, spec.head_dim, 0, 0, 0, 0};
  check(dso_cache_block_bytes(&shape) - dso_cache_block_bytes(&plain) == 2 * spec.kv_width() * (type == DSO_KV_F32 ? 4 : 2) &&
            dso_cache_block_bytes(&shape) == (int64_t)bytes.size(),
        "summaries take %ld bytes of a block", (long)(dso_cache_block_bytes(&shape) - dso_cache_block_bytes(&plain)));
}

// Groups of 32 blocks are returned to the system; with a group that stays, so do the summaries of its other blocks.
void released() {
  const dso_cache_shape shape = {DSO_KV_BF16, 8, 4, 64, 0, 0, 0, 1, nullptr};
  dso_cache* cache = nullptr;
  check(dso_cache_create(&shape, 256, &cache) == 0, "%s", dso_last_error());
  memset(cache->summaries.data(), 1, (size_t)(8 * cache->group_bytes()));
  check(dso_cache_release(cache, 40) == 0, "%s", dso_last_error());
  const uint8_t* at = cache->summaries.data();
  check(at[2 * cache->group_bytes() - 1] == 1, "the summaries of block 39 were released with later ones");
  check(at[2 * cache->group_bytes()] == 0 && at[8 * cache->group_bytes() - 1] == 0, "summaries of released blocks stayed");
  dso_cache_destroy(cache);
}

void refusals() {
  Random random(5);
  const Variant v = variants().front();
  Model m({DSO_KV_F32, 1, 2, 8, 4, 32, 1}, v, 1, true, random);
  Sequence s;
  s.rows = normal(8 * (size_t)m.spec.row_width(), 1, random);
  dso_cache plain(*v.kernels, {DSO_KV_F32, 1, 1, 8, 0, 0, 0, 0}, 4);
  dso_cache_shape bad = {DSO_KV_F32, 1, 1, 8, 0, 0, 0, 2, nullptr};
  check(dso_cache_block_bytes(&bad) == -1 && strstr(dso_last_error(), "summaries is 2"), "summaries of 2: %s",
        dso_last_error());
  dso_slot slots[] = {{DSO_SLOT_F32, 16, 0, 0}, {DSO_SLOT_F32, 4, 0, 0}};
  std::vector<float> w(16);
  std::vector<std::unique_ptr<Buffer>> keep;
  OwnContext context(*v.kernels, 1);
  const dso_weight weight = packed_weight(context.c, DSO_F32, w, 0, 1, 16, keep);
  auto plan_of = [&](auto&& spoil, dso_cache* cache, const char* words) {
    dso_step steps[] = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0}), step_of(DSO_OP_BLOCK_CHOOSE, {0}, {1})};
    dso_step& c = steps[1];
    c.heads = 2, c.kv_heads = 1, c.head_dim = 8, c.top_k = 4, c.window = 32, c.sinks = 1;
    spoil(c);
    dso_plan* plan = nullptr;
    int32_t rc = dso_plan_create(context.c, steps, 2, slots, 2, &weight, 1, 1, &plan);
    if (rc == 0) {
      const int32_t one = 1, none = 0;
      dso_batch b{};
      b.T = b.S = 1, b.max_blocks = 1, b.query_len = &one, b.context_len = &none, b.phase = &none, b.block_table = &none,
      b.inputs_embeds = w.data(), b.cache = cache;
      rc = dso_plan_run(plan, &b);
      dso_plan_destroy(plan);
    }
    check(rc == DSO_EINVAL && strstr(dso_last_error(), words), "expected \"%s\", got %d: %s", words, rc, dso_last_error());
  };
  plan_of([](dso_step&) {}, &plain, "batch.cache has no summaries");
  plan_of([](dso_step& c) { c.window = 33; }, &plain, "4 blocks that are always chosen");
  plan_of([](dso_step& c) { c.sinks = -1; }, &plain, "sinks -1");
  plan_of([](dso_step& c) { c.kv_heads = 3; }, &plain, "heads 2 is not a multiple of kv_heads 3");
  plan_of([](dso_step& c) { c.kv_heads = 2; }, &plain, "out[0] must have width 8");
}

}  // namespace

int main() {
  Random random(4);
  for (const Variant& v : vector_variants()) {
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int i = 0; i < 4; ++i) {
        const int32_t window = i == 0 ? 0 : 1 + random.below(random.below(2) ? 40 : 200),
                      sinks = random.below(3) ? random.below(40) : 0;
        const int32_t top_k = (sinks + 31) / 32 + (window + 31) / 32 + 2 + random.below(12);
        const bool wide = i == 1;  // products with ones and zeros take most of the time
        company({type, 1 + random.below(2), 1 + random.below(wide ? 2 : 8), 2 * (1 + random.below(wide ? 128 : 24)), top_k,
                 window, sinks},
                v, 1 + random.below(4), random);
      }
      caches(v, type, random);
    }
    odd_numbers(v, random);
  }
  released();
  refusals();
  return report("test_block_choose");
}
