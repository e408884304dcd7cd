// The interpreter: a model's logits against a forward pass in double; fused against plain steps; and sequences in batches, in
// chunks and with any number of threads against the same sequences alone, bit for bit, on every variant.
#include "plan_fixture.hpp"
#include "scalar_kernels.hpp"

namespace {

using Vec = std::vector<double>;

Vec product(const std::vector<float>& w, const Vec& x, const std::vector<float>* bias) {
  const size_t rows = w.size() / x.size();
  Vec y(rows);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < x.size(); ++c) y[r] += (double)w[r * x.size() + c] * x[c];
    if (bias) y[r] += (*bias)[r];
  }
  return y;
}
Vec norm(const Vec& x, const std::vector<float>& w, size_t begin, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[begin + i] * x[begin + i];
  Vec y(n);
  for (size_t i = 0; i < n; ++i) y[i] = x[begin + i] / std::sqrt(sum / (double)n + 1e-5) * w[i];
  return y;
}

// One sequence through the model, by the textbook formulas.
std::vector<Vec> forward(const Model& m, const std::vector<int32_t>& tokens) {
  const Spec& s = m.spec;
  const size_t d = (size_t)s.head_dim, group = (size_t)(s.heads / s.kv_heads);
  auto raw = [&](const std::string& name) -> const std::vector<float>& { return m.raw.at(name); };
  auto bias = [&](const std::string& name) { return s.biases ? &m.raw.at(name) : nullptr; };
  std::vector<std::vector<Vec>> keys((size_t)s.layers), values((size_t)s.layers);
  std::vector<Vec> out;
  for (size_t t = 0; t < tokens.size(); ++t) {
    Vec x(raw("embed").begin() + (long)tokens[t] * s.hidden, raw("embed").begin() + (long)(tokens[t] + 1) * s.hidden);
    auto add = [&](const Vec& y) {
      for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    };
    for (int l = 0; l < s.layers; ++l) {
      const std::string p = std::to_string(l) + ".";
      const Vec n1 = norm(x, raw(p + "norm1"), 0, x.size());
      Vec q = product(raw(p + "q"), n1, bias(p + "bq")), k = product(raw(p + "k"), n1, bias(p + "bk"));
      for (auto [v, w] : {std::pair(&q, "qn"), std::pair(&k, "kn")})
        for (size_t h = 0; h < v->size() / d; ++h) {
          Vec head(v->begin() + (long)(h * d), v->begin() + (long)((h + 1) * d));
          if (s.qk_norm) head = norm(head, raw(p + w), 0, d);
          Vec turned = head;
          for (size_t i = 0; i < (size_t)s.rot / 2; ++i) {
            const size_t a = s.interleaved() ? 2 * i : i, b = s.interleaved() ? 2 * i + 1 : i + (size_t)s.rot / 2;
            const double angle = (double)((float)t * raw("frequencies")[i]);
            turned[a] = head[a] * std::cos(angle) - head[b] * std::sin(angle);
            turned[b] = head[b] * std::cos(angle) + head[a] * std::sin(angle);
          }
          std::copy(turned.begin(), turned.end(), v->begin() + (long)(h * d));
        }
      keys[(size_t)l].push_back(k);
      values[(size_t)l].push_back(product(raw(p + "v"), n1, bias(p + "bv")));
      if (s.beta != 0)
        for (double& x : q) x *= 1 + (double)s.beta * std::log(1 + std::floor((double)(t + 1) / 7));
      Vec o(q.size());
      const size_t window = s.first_full && l == 0 ? 0 : (size_t)s.window;
      std::vector<size_t> seen;
      for (size_t u = 0; u <= t; ++u)
        if (window == 0 || (s.flags & DSO_FLAG_CHUNKED ? t / window == u / window : t - u < window || u < (size_t)s.sinks))
          seen.push_back(u);
      for (size_t h = 0; h < (size_t)s.heads; ++h) {
        double sum = 0;
        Vec acc(d);
        for (size_t u : seen) {
          double score = 0;
          for (size_t i = 0; i < d; ++i) score += q[h * d + i] * keys[(size_t)l][u][h / group * d + i];
          const double e = std::exp(score / std::sqrt((double)d));
          sum += e;
          for (size_t i = 0; i < d; ++i) acc[i] += e * values[(size_t)l][u][h / group * d + i];
        }
        for (size_t i = 0; i < d; ++i) o[h * d + i] = acc[i] / sum;
      }
      add(product(raw(p + "o"), o, nullptr));
      const Vec n2 = norm(x, raw(p + "norm2"), 0, x.size());
      Vec g = product(raw(p + "gate"), n2, bias(p + "bg"));
      const Vec u = product(raw(p + "up"), n2, bias(p + "bu"));
      for (size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
      add(product(raw(p + "down"), g, nullptr));
    }
    out.push_back(product(raw("head"), norm(x, raw("norm"), 0, x.size()), nullptr));
  }
  return out;
}

std::vector<int32_t> random_tokens(int n, const Spec& s, Random& random) {
  std::vector<int32_t> t((size_t)n);
  for (int32_t& v : t) v = random.below(s.vocab);
  return t;
}

void matches_textbook(const Spec& spec, const Kernels& kernels, int threads, int length, double tolerance, const char* what) {
  Random random(7);
  Model model(spec, kernels, threads);
  Feeder feeder(model, 40, random);
  Sequence s{random_tokens(length, spec, random), 0, {}, {}};
  const int prompt = length * 2 / 3;
  feeder.feed({{&s, prompt, DSO_PHASE_PREFILL}});
  while (s.done < length) feeder.feed({{&s, 1, DSO_PHASE_DECODE}});
  const std::vector<Vec> expected = forward(model, s.tokens);
  double worst = 0;
  for (size_t t = 0; t < expected.size(); ++t) {
    double top = 0, off = 0;
    for (size_t i = 0; i < expected[t].size(); ++i) {
      top = std::max(top, std::fabs(expected[t][i]));
      const double difference = std::fabs(expected[t][i] - s.logits[t][i]);
      off = std::isnan(difference) ? INFINITY : std::max(off, difference);
    }
    worst = std::max(worst, off / top);
  }
  check(worst <= tolerance, "%s, %s, %d threads, %d tokens: off by %g of the largest logit", kernels.isa, what, threads, length,
        worst);
}

bool equal(const Sequence& a, const Sequence& b, const char* isa, const char* what, int threads) {
  for (size_t t = 0; t < a.logits.size(); ++t)
    if (!check(memcmp(a.logits[t].data(), b.logits[t].data(), a.logits[t].size() * 4) == 0,
               "%s, %s, %d threads: token %zu differs in a batch", isa, what, threads, t))
      return false;
  return true;
}

// Sequences, each with a prompt and tokens to decode (one at a time, or several as in verification). First each alone on one
// thread with its prompt at once; then in random batches and chunks.
void company(const Spec& spec, const Kernels& kernels, int threads, const char* what, int longest, int sequences = 5) {
  Random random(11);
  struct Life {
    int prompt;
    Sequence alone, mixed;
  };
  std::vector<Life> lives;
  for (int i = 0; i < sequences; ++i) {
    const int prompt = i == 0 ? longest : 1 + random.below(70), total = prompt + 1 + random.below(8);
    const std::vector<int32_t> tokens = random_tokens(total, spec, random);
    lives.push_back({prompt, {tokens, 0, {}, {}}, {tokens, 0, {}, {}}});
  }
  {
    Model model(spec, kernels, 1);
    Feeder feeder(model, 128, random);
    for (Life& l : lives) {
      feeder.feed({{&l.alone, l.prompt, DSO_PHASE_PREFILL}});
      while (l.alone.done < (int)l.alone.tokens.size()) feeder.feed({{&l.alone, 1, DSO_PHASE_DECODE}});
    }
  }
  Model model(spec, kernels, threads);
  Feeder feeder(model, 128, random);
  for (bool more = true; more;) {
    std::vector<Feeder::Part> decode, prefill;
    more = false;
    for (Life& l : lives) {
      const int left = (int)l.mixed.tokens.size() - l.mixed.done;
      if (left == 0) continue;
      more = true;
      if (random.below(3) == 0) continue;
      if (l.mixed.done < l.prompt) {
        const int rest = l.prompt - l.mixed.done;
        prefill.push_back({&l.mixed, random.below(2) ? rest : 1 + random.below(rest), DSO_PHASE_PREFILL});
      } else {
        decode.push_back({&l.mixed, 1 + random.below(std::min(left, 3)), DSO_PHASE_DECODE});
      }
    }
    decode.insert(decode.end(), prefill.begin(), prefill.end());
    if (!decode.empty() && feeder.feed(decode)) return;
  }
  for (Life& l : lives)
    if (!equal(l.alone, l.mixed, kernels.isa, what, threads)) return;
}

void fused_equals_plain(Spec spec, const Kernels& kernels, const char* what) {
  Random random(3);
  const std::vector<int32_t> tokens = random_tokens(45, spec, random);
  Sequence a{tokens, 0, {}, {}}, b{tokens, 0, {}, {}};
  std::vector<float> hidden_a, hidden_b;
  for (Sequence* s : {&a, &b}) {
    spec.fused = s == &a;
    spec.select_first = s == &a;
    Model model(spec, kernels, 2);
    // Both have the same weights: they are drawn in the same order.
    Feeder feeder(model, 8, random);
    feeder.feed({{s, 40, DSO_PHASE_PREFILL}}, s == &a ? &hidden_a : &hidden_b);
    while (s->done < 45) feeder.feed({{s, 1, DSO_PHASE_DECODE}});
  }
  equal(a, b, kernels.isa, what, 2);
  check(hidden_a == hidden_b, "%s, %s: hidden states differ between fused and plain steps", kernels.isa, what);
}

void hidden_and_embeddings(const Kernels& kernels) {
  Spec spec;
  Random random(5);
  Model model(spec, kernels, 2);
  dso_cache cache(kernels, {spec.kv_type, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr}, 2);
  const int32_t T = 9, query[] = {T}, context[] = {0}, phase[] = {DSO_PHASE_PREFILL}, table[] = {1};
  std::vector<int32_t> ids = random_tokens(T, spec, random), positions(T);
  for (int i = 0; i < T; ++i) positions[(size_t)i] = i;
  const int32_t rows[] = {2, 8};
  std::vector<float> by_ids(2 * (size_t)spec.vocab), by_embeddings(by_ids.size()), embeddings((size_t)(T * spec.hidden)),
      hidden((size_t)(spec.layers * T * spec.hidden));
  for (int t = 0; t < T; ++t)
    std::copy_n(model.raw["embed"].begin() + (long)ids[(size_t)t] * spec.hidden, spec.hidden,
                embeddings.begin() + (long)t * spec.hidden);
  dso_batch b{};
  b.T = T;
  b.S = b.max_blocks = 1;
  b.R = 2;
  b.token_ids = ids.data();
  b.positions = positions.data();
  b.query_len = query;
  b.context_len = context;
  b.phase = phase;
  b.block_table = table;
  b.logit_rows = rows;
  b.logits = by_ids.data();
  b.hidden = hidden.data();
  b.cache = &cache;
  check(dso_plan_run(model.plan, &b) == 0, "run: %s", dso_last_error());
  check(std::equal(embeddings.begin(), embeddings.end(), hidden.begin()), "%s: hidden state 0 is not the embedding",
        kernels.isa);
  b.token_ids = nullptr;
  b.inputs_embeds = embeddings.data();
  b.logits = by_embeddings.data();
  check(dso_plan_run(model.plan, &b) == 0, "run: %s", dso_last_error());
  check(by_ids == by_embeddings, "%s: inputs_embeds differ from the ids they stand for", kernels.isa);
  b.R = 0;
  b.logits = nullptr;
  check(dso_plan_run(model.plan, &b) == 0, "no logits asked: %s", dso_last_error());
}

void timing(const Kernels& kernels) {
  Spec spec;
  Random random(5);
  Model model(spec, kernels, 2);
  Feeder feeder(model, 8, random);
  Sequence s{random_tokens(40, spec, random), 0, {}, {}};
  std::vector<double> seconds(model.steps.size());
  int64_t runs = -1;
  check(dso_plan_set_timing(model.plan, 1) == 0, "timing on");
  feeder.feed({{&s, 30, DSO_PHASE_PREFILL}});
  feeder.feed({{&s, 1, DSO_PHASE_DECODE}});
  check(dso_plan_timing(model.plan, seconds.data(), &runs) == 0 && runs == 2, "timing: %ld runs", (long)runs);
  double all = 0;
  for (size_t i = 0; i < seconds.size(); ++i) {
    all += seconds[i];
    check(seconds[i] >= 0 && (seconds[i] > 0 || model.steps[i].op == DSO_OP_HIDDEN_OUT), "step %zu took %g s", i, seconds[i]);
  }
  check(all > 0 && all < 10, "all steps took %g s", all);
}

#ifndef DSO_SCALAR_ONLY
// LINEAR_GELU gives the bits of LINEAR and the activation after it, in fp32 and in the kind of the next product.
void gelu_of_products(const Kernels& kernels, int32_t format, int32_t kind, int32_t flags, int32_t T) {
  constexpr int32_t cols = 72, width = 104;
  Random random((uint64_t)(T + flags + format));
  OwnContext context(kernels, 2);
  std::vector<std::unique_ptr<Buffer>> keep;
  const std::vector<float> bias = normal(width, 1, random), x = normal((size_t)(T * cols), 1, random);
  const dso_weight weights[] = {packed_weight(context.c, format, normal(width * cols, 0.2f, random), 0, width, cols, keep),
                                packed_weight(context.c, format, normal(width * width, 0.2f, random), 0, width, width, keep),
                                {DSO_VECTOR, 1, width, 0, bias.data(), 4 * width}};
  std::vector<dso_slot> slots = {{DSO_SLOT_F32, cols, 0, 0}, {kind, cols, 0, 0}};
  std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0})};
  int32_t results = 0;
  const auto add = [&](int32_t op, int32_t in, int32_t to, std::vector<int32_t> w, std::vector<int32_t> b) {
    slots.push_back({to, width, 0, 0});
    const int32_t out = (int32_t)slots.size() - 1;
    steps.push_back(step_of(op, {in}, {out}, w, b));
    if (op == DSO_OP_LINEAR_GELU) steps.back().flags = flags;
    return out;
  };
  const auto result = [&](int32_t slot) {
    steps.push_back(step_of(DSO_OP_HIDDEN_OUT, {slot}, {}));
    steps.back().layer = results++;
  };
  if (kind != DSO_SLOT_F32) steps.push_back(step_of(DSO_OP_CONVERT, {0}, {1}));
  const int32_t in = kind == DSO_SLOT_F32 ? 0 : 1, gelu = flags ? DSO_OP_GELU : DSO_OP_GELU_ERF;
  const int32_t up = add(DSO_OP_LINEAR, in, DSO_SLOT_F32, {0}, {2});
  result(add(gelu, up, DSO_SLOT_F32, {}, {}));
  result(add(DSO_OP_LINEAR_GELU, in, DSO_SLOT_F32, {0}, {2}));
  result(add(DSO_OP_LINEAR, add(gelu, up, kind, {}, {}), DSO_SLOT_F32, {1}, {}));
  result(add(DSO_OP_LINEAR, add(DSO_OP_LINEAR_GELU, in, kind, {0}, {2}), DSO_SLOT_F32, {1}, {}));
  dso_plan* plan = nullptr;
  if (!check(dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots.data(), (int32_t)slots.size(), weights, 3, 1,
                             &plan) == 0,
             "plan: %s", dso_last_error()))
    return;
  std::vector<float> hidden((size_t)(results * T * width), NAN);
  const int32_t zero = 0, phase = DSO_PHASE_PREFILL;
  dso_batch b{};
  b.T = T, b.S = 1, b.query_len = &T, b.context_len = &zero, b.phase = &phase;
  b.states = x.data(), b.hidden = hidden.data();
  check(dso_plan_run(plan, &b) == 0, "run: %s", dso_last_error());
  const size_t one = (size_t)(T * width);
  for (size_t pair : {0, 2})
    check(!memcmp(&hidden[pair * one], &hidden[(pair + 1) * one], one * 4),
          "%s, format %d, kind %d, flags %d, %d rows: result %zu", kernels.isa, format, kind, flags, T, pair + 1);
  for (float v : hidden) check(std::isfinite(v), "a result is %g", v);
  dso_plan_destroy(plan);
}

// A slot may hold any block indices; none leads outside the table, even if fp32 would round the last one up.
void chosen_blocks_stay_inside(const Kernels& kernels) {
  OwnContext context(kernels, 1);
  std::vector<std::unique_ptr<Buffer>> keep;
  const dso_weight weight = packed_weight(context.c, DSO_F32, {0, 0}, 0, 1, 2, keep);
  const dso_slot slots[] = {{DSO_SLOT_F32, 2, 0, 0}, {DSO_SLOT_F32, 2, 0, 0}};
  dso_step steps[] = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0}), step_of(DSO_OP_ATTENTION, {0, 0}, {1}),
                      step_of(DSO_OP_HIDDEN_OUT, {1}, {})};
  steps[1].heads = steps[1].kv_heads = 1, steps[1].head_dim = steps[1].top_k = 2;
  dso_plan* plan = nullptr;
  if (!check(dso_plan_create(context.c, steps, 3, slots, 2, &weight, 1, 1, &plan) == 0, "plan: %s", dso_last_error())) return;
  const std::vector<int32_t> table((1 << 24) + 4, 0);
  dso_cache cache(kernels, {DSO_KV_F32, 1, 1, 2, 0, 0, 0, 0, nullptr}, 1);
  const int32_t one = 1, context_len = 32 * (int32_t)(table.size() - 1), phase = DSO_PHASE_DECODE;
  for (const float number : {3e9f, INFINITY, -1.0f, -INFINITY}) {
    const float q[] = {number, 5};
    float out[] = {NAN, NAN};
    dso_batch b{};
    b.T = b.S = 1, b.max_blocks = (int32_t)table.size(), b.query_len = &one, b.context_len = &context_len, b.phase = &phase,
    b.block_table = table.data();
    b.inputs_embeds = q, b.hidden = out, b.cache = &cache;
    check(dso_plan_run(plan, &b) == 0, "run: %s", dso_last_error());
    check(!std::isfinite(number) || (out[0] == 0 && out[1] == 0), "of values that are 0 came %g, %g", out[0], out[1]);
  }
  dso_plan_destroy(plan);
}
#endif

}  // namespace

int main() {
  Spec plain;
  plain.fused = false;
  Spec rich;  // features of Qwen, windows and partial rotation
  rich.biases = rich.qk_norm = true;
  rich.window = 20;
  rich.rot = 8;
  rich.flags = DSO_FLAG_INTERLEAVED;
  Spec eager = rich;
  eager.flags |= DSO_FLAG_EAGER;
  for (const Spec& s : {Spec(), plain, rich, eager})
    for (int threads : {1, 2, 5}) {
      matches_textbook(s, scalar::table, threads, 50, 2e-5, s.fused ? "fused" : "plain");
      company(s, scalar::table, threads, "f32", 75);
      company(s, scalar::table, threads, "many, f32", 75, 24);
    }
  matches_textbook(Spec(), scalar::table, 3, 330, 2e-5, "two chunks");
  Spec sliding;
  sliding.window = 50;
  sliding.sinks = 4;
  Spec mixed = sliding;
  mixed.first_full = true;
  Spec chunks;
  chunks.window = 45;
  chunks.flags = DSO_FLAG_CHUNKED;
  chunks.beta = 0.4f;
  Spec eager_chunks = chunks;
  eager_chunks.flags |= DSO_FLAG_EAGER;
  eager_chunks.first_full = true;
  for (const Spec& s : {sliding, mixed, chunks, eager_chunks})
    for (int threads : {1, 3}) {
      matches_textbook(s, scalar::table, threads, 330, 2e-5, "sliding");
      company(s, scalar::table, threads, "sliding, f32", 330, 8);
    }
  fused_equals_plain(rich, scalar::table, "f32");
  hidden_and_embeddings(scalar::table);
  timing(scalar::table);

#ifndef DSO_SCALAR_ONLY
  chosen_blocks_stay_inside(*variants().front().kernels);
  for (const Variant& v : variants()) {
    matches_textbook(Spec(), *v.kernels, 2, 330, 1e-4, "f32");
    matches_textbook(rich, *v.kernels, 2, 60, 1e-4, "rich f32");
    matches_textbook(eager, *v.kernels, 2, 60, 1e-4, "eager f32");
    matches_textbook(sliding, *v.kernels, 2, 600, 1e-4, "sliding f32");
    matches_textbook(chunks, *v.kernels, 2, 600, 1e-4, "chunks f32");
    matches_textbook(eager_chunks, *v.kernels, 2, 200, 1e-4, "eager chunks f32");
    hidden_and_embeddings(*v.kernels);
    const struct {
      const char* name;
      int32_t format, activation, kv;
    } kinds[] = {{"f32", DSO_F32, DSO_SLOT_F32, DSO_KV_F32},
                 {"bf16", DSO_BF16, DSO_SLOT_BF16, DSO_KV_BF16},
                 {"int8", DSO_INT8, DSO_SLOT_Q16, DSO_KV_INT8},
                 {"int4", DSO_INT4, DSO_SLOT_Q8, DSO_KV_BF16},
                 {"fp8", DSO_FP8, DSO_SLOT_BF16, DSO_KV_BF16}};
    for (const auto& k : kinds) {
      for (int32_t flags : {0, (int32_t)DSO_FLAG_GELU})
        for (int32_t T : {1, 5, 300}) gelu_of_products(*v.kernels, k.format, k.activation, flags, T);
      for (Spec s : {Spec(), rich, sliding, mixed, chunks}) {
        s.format = k.format;
        s.activation = k.activation;
        s.kv_type = k.kv;
        company(s, *v.kernels, 2, k.name, 300);
        company(s, *v.kernels, 5, k.name, 40);
        company(s, *v.kernels, 2, k.name, 40, 24);  // enough sequences that an attention task takes all heads of one
        fused_equals_plain(s, *v.kernels, k.name);
      }
    }
  }
#endif
  return report("test_plan");
}
