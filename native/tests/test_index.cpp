// The lightning indexer on every variant: keys are read as written, scores against double, the choice against a sort, and,
// through plans, that a row's choice does not depend on its step, other rows or the number of threads.
#include <algorithm>
#include <memory>

#include "cache.hpp"
#include "scalar_kernels.hpp"
// After scalar_kernels.hpp, whose names layout.hpp also defines.
#include "plan_parts.hpp"

// Blocks in shuffled order in guarded memory that is NaN initially.
struct Keys {
  dso_cache_shape shape;
  KvLayout layout;
  Buffer memory;
  std::vector<int32_t> table;
  KvView view;

  Keys(const Kernels& k, int32_t type, int32_t index, int64_t tokens, Random& random)
      : shape{type, 1, 0, 0, 6, 2, index, 0, nullptr},
        layout(checked_layers(k, shape)[0].layout),
        memory((size_t)((tokens + 31) / 32 * layout.layer_bytes), 0xff),
        table((size_t)(tokens + 31) / 32) {
    for (size_t i = 0; i < table.size(); ++i) table[i] = (int32_t)i;
    random.shuffle(table);
    view = {memory.get(), layout.layer_bytes, table.data()};
  }
};

static void layer_norm(const Variant& v, int64_t n, Random& random) {
  std::vector<float> x = normal((size_t)n, 2, random), w = normal((size_t)n, 1, random), b = normal((size_t)n, 1, random),
                     want((size_t)n);
  const float mean = random.below(2) ? 0.0f : 50.0f;
  for (float& e : x) e += mean;
  std::vector<float> out((size_t)n + 3, -77.0f);
  v.kernels->layer_norm(x.data(), w.data(), b.data(), n, 1e-6f, out.data());
  scalar::layer_norm(x.data(), w.data(), b.data(), n, 1e-6f, want.data());
  for (int64_t i = 0; i < n; ++i)
    check(std::fabs(out[(size_t)i] - want[(size_t)i]) <= 1e-6f * (1 + mean) * (1 + std::fabs(want[(size_t)i])),
          "%s layer_norm of %ld: [%ld] is %g, not %g", v.name.c_str(), (long)n, (long)i, out[(size_t)i], want[(size_t)i]);
  for (int i = 0; i < 3; ++i)
    check(out[(size_t)(n + i)] == -77.0f, "%s layer_norm of %ld wrote past its row", v.name.c_str(), (long)n);
}

static void write(const Variant& v, int type, int32_t index, Random& random) {
  const int64_t tokens = 1 + random.below(100);
  Keys keys(*v.kernels, type, index, tokens, random);
  const std::vector<float> k = normal((size_t)(tokens * index), 1, random);
  std::vector<int64_t> cuts = {0};
  while (cuts.back() < tokens) cuts.push_back(std::min<int64_t>(tokens, cuts.back() + 1 + random.below(40)));
  for (size_t i = cuts.size() - 1; i > 0; --i)  // the last piece first: rows are written without touching their neighbors
    v.kernels->index_write(keys.layout, keys.view, cuts[i - 1], cuts[i] - cuts[i - 1], k.data() + cuts[i - 1] * index,
                           index * 4);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < index; ++i) {
      const float given = k[(size_t)(t * index + i)], got = scalar::index_number(keys.layout, keys.view, t, i);
      if (!check(got == (type == DSO_KV_F32 ? given : rounded_bf16(given)),
                 "%s %s index=%d token %ld [%ld]: %g came back as %g", v.name.c_str(), kv_name(type), index, (long)t, (long)i,
                 given, got))
        return;
    }
  const uint8_t* latents = keys.memory.get();
  for (size_t b = 0; b < keys.table.size(); ++b)
    for (int64_t i = 0; i < 32 * keys.layout.row_bytes; ++i)
      if (!check(latents[(int64_t)b * keys.layout.layer_bytes + i] == 0xff, "%s: keys were written over latents",
                 v.name.c_str()))
        return;
}

static void scores(const Variant& v, int type, int64_t heads, int32_t index, int64_t tokens, Random& random) {
  const bool rounds = type != DSO_KV_F32 && has_dot_bf16(v.name);
  Keys keys(*v.kernels, type, index, tokens, random);
  const std::vector<float> k = normal((size_t)(tokens * index), 1, random), w = normal((size_t)heads, 1, random);
  std::vector<float> q = normal((size_t)(heads * index), 1, random);
  v.kernels->index_write(keys.layout, keys.view, 0, tokens, k.data(), index * 4);
  const float scale = 1 / std::sqrt((float)(heads * index));
  Buffer packed((size_t)v.kernels->index_query_bytes(heads, index), 0xff), all((size_t)tokens * 4, 0xff);
  v.kernels->index_query(keys.layout, heads, q.data(), packed.get());
  const float* got = (const float*)all.get();
  v.kernels->index_scores(keys.layout, keys.view, heads, packed.get(), w.data(), 0, tokens, scale, (float*)all.get());
  if (rounds)
    for (float& x : q) x = rounded_bf16(x);
  double size = 0;  // of the terms of a score
  for (float x : w) size += std::fabs(x);
  const double bound = 1e-6 * size * scale * (double)index;
  for (int64_t t = 0; t < tokens; ++t) {
    const double want = scalar::index_score(keys.layout, keys.view, heads, q.data(), w.data(), t, scale);
    if (!check(std::fabs(got[t] - want) <= bound, "%s %s heads=%ld index=%d: token %ld has score %.8g, not %.8g",
               v.name.c_str(), kv_name(type), (long)heads, index, (long)t, got[t], want))
      break;
  }
  const int64_t begin = random.below((int)tokens), end = begin + 1 + random.below((int)(tokens - begin));
  Buffer part((size_t)(end - begin) * 4, 0xff);
  v.kernels->index_scores(keys.layout, keys.view, heads, packed.get(), w.data(), begin, end, scale, (float*)part.get());
  check(!memcmp(part.get(), got + begin, part.size()),
        "%s %s heads=%ld index=%d: scores of [%ld, %ld) differ from those of all", v.name.c_str(), kv_name(type), (long)heads,
        index, (long)begin, (long)end);

  std::vector<float> bad(k.begin(), k.begin() + index);  // a token that must not be read
  bad[(size_t)random.below(index)] = NAN;
  v.kernels->index_write(keys.layout, keys.view, begin, 1, bad.data(), index * 4);
  Buffer poisoned((size_t)tokens * 4, 0xff);
  const float* after = (const float*)poisoned.get();
  v.kernels->index_scores(keys.layout, keys.view, heads, packed.get(), w.data(), 0, tokens, scale, (float*)poisoned.get());
  for (int64_t t = 0; t < tokens; ++t)
    if (!check(t == begin ? after[t] == INFINITY : after[t] == got[t], "%s: with a NaN in token %ld, token %ld has score %g",
               v.name.c_str(), (long)begin, (long)t, after[t]))
      break;
}

static void select(const Variant& v, int64_t n, int64_t k, int kind, Random& random) {
  const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, 1e-40f, -1e-40f, 3.4e38f, 1.0f};
  Buffer memory((size_t)n * 4), out((size_t)k * 4, 0xff);
  float* x = (float*)memory.get();
  for (int64_t i = 0; i < n; ++i)
    x[i] = kind == 0   ? random.normal()
           : kind == 1 ? (float)random.below(5) - 2
           : kind == 2 ? special[random.below(8)]
           : kind == 3 ? -1.5f
                       : std::fabs(random.normal()) * 1e-3f;
  std::vector<float> want((size_t)k);
  scalar::index_select(x, n, k, want.data());
  v.kernels->index_select(x, n, k, (float*)out.get());
  check(!memcmp(want.data(), out.get(), out.size()), "%s: select %ld of %ld, kind %d", v.name.c_str(), (long)k, (long)n, kind);
}

// ---- through plans

struct Shape {
  int32_t type, heads, index, top_k, width;
};

// x, passed as embeddings -> q, k, w by linear products; k's norm is written to the cache; the chosen tokens are returned as a
// hidden state.
class Chooser {
 public:
  Chooser(const Shape& shape, const Kernels& kernels, int threads, int64_t blocks)
      : shape(shape),
        context_{std::make_shared<Context>(kernels, threads)},
        cache_(kernels, {shape.type, 2, 0, 0, 6, 2, shape.index, 0, nullptr}, blocks) {
    Random random(3);
    const int32_t rows[] = {shape.heads * shape.index, shape.index, shape.heads};
    for (int i = 0; i < 3; ++i) {
      raw[i] = normal((size_t)(rows[i] * shape.width), 1, random);
      weights.push_back(packed_weight(&context_, DSO_F32, raw[i], 0, rows[i], shape.width, packed_));
    }
    gain = normal((size_t)shape.index, 1, random);
    weights.push_back({DSO_VECTOR, 1, shape.index, 0, gain.data(), 4 * (int64_t)shape.index});
    table_.assign((size_t)((shape.width + 31) / 32 * 32 * 16), 0);
    weights.push_back({DSO_F32, 1, shape.width, 0, table_.data(), 4 * (int64_t)table_.size()});
    for (int32_t width : {shape.width, rows[0], rows[1], rows[2], shape.index, shape.top_k})
      slots.push_back({DSO_SLOT_F32, width, 0, 0});
    auto step = [&](int32_t op, std::vector<int32_t> in, std::vector<int32_t> out, std::vector<int32_t> w,
                    std::vector<int32_t> b) -> dso_step& {
      dso_step s = step_of(op, in, out, w, b);
      s.eps = 1e-6f;
      s.layer = op == DSO_OP_INDEX_WRITE || op == DSO_OP_INDEX_CHOOSE;
      s.index = s.layer ? shape.index : 0;
      steps.push_back(s);
      return steps.back();
    };
    step(DSO_OP_EMBEDDING, {}, {0}, {4}, {});
    step(DSO_OP_LINEAR, {0}, {1, 2, 3}, {0, 1, 2}, {});
    step(DSO_OP_LAYER_NORM, {2}, {4}, {3}, {3});
    step(DSO_OP_INDEX_WRITE, {4}, {}, {}, {});
    dso_step& choose = step(DSO_OP_INDEX_CHOOSE, {1, 3}, {5}, {}, {});
    choose.heads = shape.heads;
    choose.top_k = shape.top_k;
    choose.scale = 0.25f;
    step(DSO_OP_HIDDEN_OUT, {5}, {}, {}, {});
    check(create(&plan_) == 0, "plan: %s", dso_last_error());
    for (int32_t i = 0; i < blocks; ++i) free_.push_back(i);
    random.shuffle(free_);
  }
  ~Chooser() { dso_plan_destroy(plan_); }
  Chooser(const Chooser&) = delete;

  int32_t create(dso_plan** plan) {
    return dso_plan_create(&context_, steps.data(), (int32_t)steps.size(), slots.data(), (int32_t)slots.size(), weights.data(),
                           (int32_t)weights.size(), 1, plan);
  }

  struct Sequence {
    std::vector<float> x;  // [tokens, width]
    int32_t done = 0;
    std::vector<int32_t> blocks;
    std::vector<float> chosen;  // [done, top_k]
  };
  struct Part {
    Sequence* sequence;
    int32_t rows, phase;
  };
  void feed(const std::vector<Part>& parts) {
    std::vector<int32_t> query, context, phase, table, positions;
    std::vector<float> x;
    size_t most = 0;
    for (const Part& p : parts) {
      while ((int32_t)p.sequence->blocks.size() * 32 < p.sequence->done + p.rows) {
        p.sequence->blocks.push_back(free_.back());
        free_.pop_back();
      }
      most = std::max(most, p.sequence->blocks.size());
    }
    for (const Part& p : parts) {
      query.push_back(p.rows);
      context.push_back(p.sequence->done);
      phase.push_back(p.phase);
      x.insert(x.end(), p.sequence->x.begin() + (long)p.sequence->done * shape.width,
               p.sequence->x.begin() + (long)(p.sequence->done + p.rows) * shape.width);
      for (size_t i = 0; i < most; ++i) table.push_back(i < p.sequence->blocks.size() ? p.sequence->blocks[i] : -7);
    }
    dso_batch b{};
    b.T = (int32_t)(x.size() / (size_t)shape.width);
    b.S = (int32_t)parts.size();
    b.max_blocks = (int32_t)most;
    b.query_len = query.data();
    b.context_len = context.data();
    b.phase = phase.data();
    b.block_table = table.data();
    b.inputs_embeds = x.data();
    std::vector<float> out((size_t)b.T * (size_t)shape.top_k, NAN);
    b.hidden = out.data();
    b.cache = &cache_;
    if (!check(dso_plan_run(plan_, &b) == 0, "run: %s", dso_last_error())) return;
    long row = 0;
    for (const Part& p : parts) {
      p.sequence->chosen.insert(p.sequence->chosen.end(), out.begin() + row * shape.top_k,
                                out.begin() + (row + p.rows) * shape.top_k);
      p.sequence->done += p.rows;
      row += p.rows;
    }
  }

  const Shape shape;
  std::vector<float> raw[3], gain;
  std::vector<dso_slot> slots;
  std::vector<dso_step> steps;
  std::vector<dso_weight> weights;

 private:
  dso_context context_;
  dso_cache cache_;
  std::vector<std::unique_ptr<Buffer>> packed_;
  std::vector<float> table_;
  dso_plan* plan_ = nullptr;
  std::vector<int32_t> free_;
};

// Every row's chosen tokens ascend and are visible, and no token that was not chosen has a score larger by more than rounding.
static void matches_doubles(const Chooser& c, const Chooser::Sequence& s, const char* name) {
  const Shape& h = c.shape;
  const int64_t n = s.done;
  std::vector<double> k((size_t)(n * h.index)), q((size_t)(h.heads * h.index)), w((size_t)h.heads);
  auto product = [&](int which, int64_t t, std::vector<double>& out, size_t at, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      double x = 0;
      for (int64_t i = 0; i < h.width; ++i)
        x += (double)c.raw[which][(size_t)(r * h.width + i)] * s.x[(size_t)(t * h.width + i)];
      out[at + (size_t)r] = x;
    }
  };
  for (int64_t t = 0; t < n; ++t) {
    product(1, t, k, (size_t)(t * h.index), h.index);
    double* row = k.data() + t * h.index;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < h.index; ++i) mean += row[i] / h.index;
    for (int64_t i = 0; i < h.index; ++i) variance += (row[i] - mean) * (row[i] - mean) / h.index;
    for (int64_t i = 0; i < h.index; ++i)
      row[i] = (row[i] - mean) / std::sqrt(variance + 1e-6) * c.gain[(size_t)i] + c.gain[(size_t)i];
  }
  const double rounding = h.type == DSO_KV_F32 ? 1e-5 : 2e-2;
  for (int64_t t = 0; t < n; t += 1 + n / 40) {
    product(0, t, q, 0, h.heads * h.index);
    product(2, t, w, 0, h.heads);
    double size = 0;
    std::vector<double> score((size_t)t + 1, 0.0);
    for (int64_t j = 0; j <= t; ++j) {
      double terms = 0;
      for (int64_t a = 0; a < h.heads; ++a) {
        double x = 0;
        for (int64_t i = 0; i < h.index; ++i) x += q[(size_t)(a * h.index + i)] * k[(size_t)(j * h.index + i)];
        score[(size_t)j] += 0.25 * std::max(x, 0.0) * w[(size_t)a];
        terms += 0.25 * std::fabs(x * w[(size_t)a]);
      }
      size = std::max(size, terms);
    }
    const float* chosen = s.chosen.data() + t * h.top_k;
    const int64_t count = std::min<int64_t>(t + 1, h.top_k);
    std::vector<bool> in((size_t)t + 1);
    double least = INFINITY, best = -INFINITY;
    for (int64_t i = 0; i < h.top_k; ++i) {
      const float at = chosen[i];
      if (i >= count) {
        check(at == -1, "%s: row %ld of top_k %d has %g at %ld", name, (long)t, h.top_k, at, (long)i);
      } else if (check(at == std::floor(at) && at >= 0 && at <= (float)t && (i == 0 || at > chosen[i - 1]),
                       "%s: row %ld chose %g at %ld", name, (long)t, at, (long)i)) {
        in[(size_t)at] = true;
        least = std::min(least, score[(size_t)at]);
      }
    }
    for (int64_t j = 0; j <= t; ++j)
      if (!in[(size_t)j]) best = std::max(best, score[(size_t)j]);
    check(best <= least + rounding * size, "%s %s heads=%d index=%d: row %ld left out a score of %g, and chose one of %g", name,
          kv_name(h.type), h.heads, h.index, (long)t, best, least);
  }
}

static void plans(const Shape& shape, const Kernels& kernels, int threads, int32_t tokens) {
  Random random((uint64_t)tokens);
  const int64_t blocks = 3 * ((tokens + 31) / 32 + 3);
  Chooser alone(shape, kernels, 1, blocks), together(shape, kernels, threads, blocks);
  Chooser::Sequence a{normal((size_t)(tokens * shape.width), 1, random), 0, {}, {}}, b = a;
  Chooser::Sequence other{normal((size_t)(tokens * shape.width), 1, random), 0, {}, {}},
      third{normal((size_t)(tokens * shape.width), 1, random), 0, {}, {}};
  alone.feed({{&a, tokens, DSO_PHASE_PREFILL}});
  matches_doubles(alone, a, kernels.isa);
  // The same sequence in steps of any size, in either phase, together with two others.
  while (b.done < tokens) {
    const int32_t left = tokens - b.done,
                  rows = std::min(left, random.below(3) ? 1 + random.below(6) : 1 + random.below(tokens));
    std::vector<Chooser::Part> parts = {{&b, rows, random.below(2)}};
    for (Chooser::Sequence* s : {&other, &third})
      if (s->done < tokens && random.below(3)) {
        const int32_t n = std::min(tokens - s->done, 1 + random.below(random.below(2) ? 3 : 50));
        parts.insert(random.below(2) ? parts.begin() : parts.end(), {s, n, random.below(2)});
      }
    std::stable_sort(parts.begin(), parts.end(), [](const auto& x, const auto& y) { return x.phase < y.phase; });
    together.feed(parts);
  }
  check(a.chosen == b.chosen, "%s %s heads=%d index=%d top_k=%d, %d threads: the choice depends on steps and other sequences",
        kernels.isa, kv_name(shape.type), shape.heads, shape.index, shape.top_k, threads);
}

static void refusals(const Kernels& kernels) {
  const struct {
    int step;
    void (*spoil)(dso_step&);
    const char* words;
  } cases[] = {
      {2, [](dso_step& s) { s.b[0] = -1; }, "b[0] is weight -1"},
      {2, [](dso_step& s) { s.eps = -1; }, "eps is -1"},
      {3, [](dso_step& s) { s.index = 10; }, "in[0] must have width 10"},
      {3, [](dso_step& s) { s.index = 0; }, "index is 0"},
      {3, [](dso_step& s) { s.layer = -1; }, "layer is -1"},
      {4, [](dso_step& s) { s.heads = 4; }, "in[0] must have width 32"},
      {4, [](dso_step& s) { s.index = 16; }, "an earlier step has 8"},
      {4, [](dso_step& s) { s.top_k = 0; }, "top_k is 0"},
      {4, [](dso_step& s) { s.top_k = 9; }, "out[0] must have width 9"},
      {4, [](dso_step& s) { s.w[0] = 0; }, "w[0] is 0, must be -1"},
  };
  for (const auto& c : cases) {
    Chooser chooser({DSO_KV_F32, 3, 8, 5, 24}, kernels, 1, 4);
    c.spoil(chooser.steps[(size_t)c.step]);
    dso_plan* plan = nullptr;
    check(chooser.create(&plan) == DSO_EINVAL && strstr(dso_last_error(), c.words), "%s: \"%s\"", c.words, dso_last_error());
  }
}

int main() {
  Random random(4);
  for (const Variant& v : variants_with_own(&Kernels::index_scores)) {
    for (int64_t n : {1, 2, 15, 16, 17, 63, 64, 128, 131, 1000}) layer_norm(v, n, random);
    for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
      for (int32_t index : {2, 6, 16, 30, 32, 64, 96, 128}) {
        write(v, type, index, random);
        scores(v, type, 1 + random.below(64), index, 1 + random.below(random.below(2) ? 40 : 300), random);
      }
      scores(v, type, 64, 128, 333, random);
      plans({type, 1 + random.below(40), 2 * (1 + random.below(30)), 1 + random.below(60), 24}, *v.kernels, 2, 200);
      plans({type, 3, 16, 1, 24}, *v.kernels, 5, 70);
    }
    for (int kind = 0; kind < 5; ++kind)
      for (int i = 0; i < rounds(40); ++i) {
        const int64_t n = 2 + random.below(random.below(2) ? 40 : 3000);
        select(v, n, 1 + random.below((int)std::min<int64_t>(n - 1, 512)), kind, random);
      }
  }
  const Variant best = variants().back();
  refusals(*best.kernels);
  plans({DSO_KV_BF16, 8, 32, 512, 24}, *best.kernels, 5, 1500);  // ranges of tokens, one row a step and many
  plans({DSO_KV_F32, 5, 10, 40, 24}, scalar::table, 3, 700);
  return report("test_index");
}
