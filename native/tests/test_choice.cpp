// dso_choose and dso_plan_decode: equal on every variant; a decode call equals single steps; arguments; memory (ASan).
#include "choice.hpp"

#include "decode_fixture.hpp"

static void test_variants_choose_the_same() {
  Random random(5);
  const std::vector<Variant> variants = ::vector_variants();
  int decided = 0, undecided = 0;
  for (int round = 0; round < rounds(400); ++round) {
    const int32_t vocab = 1 + random.below(round % 4 ? 300 : 5000);
    std::vector<float> logits = normal((size_t)vocab, 1.0f + (float)random.below(6), random), noise((size_t)vocab);
    if (round % 3 == 0)
      for (float& x : logits) x = std::nearbyint(x);
    if (round % 7 == 0) logits[(size_t)random.below(vocab)] = round % 2 ? NAN : INFINITY;
    if (round % 5 == 0)
      for (float& x : logits) x = random.below(3) ? x : -INFINITY;
    for (float& x : noise) x = -std::log(random.uniform() + 1e-8f) + 1e-9f;
    std::vector<int32_t> text((size_t)random.below(20));
    for (int32_t& token : text) token = random.below(vocab);
    const double number = random.uniform();
    dso_choice c = greedy();
    c.temperature = round % 6 ? 0.3f + random.uniform() : 0;
    c.top_k = random.below(2) ? random.below(60) : 0;
    c.top_p = random.below(2) ? random.uniform() : 1;
    c.min_p = random.below(3) ? 0 : random.uniform();
    (random.below(2) ? (void)(c.numbers = &number) : (void)(c.noise = noise.data()));
    c.noise_stride = vocab;
    if (random.below(2)) {
      c.repetition = 1.25f;
      c.frequency = 0.5f;
      c.window = random.below(4);
      c.tokens = text.data();
      c.n_tokens = (int32_t)text.size();
      c.n_prompt = random.below((int)text.size() + 1);
    }
    std::vector<int32_t> barred((size_t)random.below(4));
    for (int32_t& token : barred) token = random.below(vocab);
    c.barred = barred.data();
    c.n_barred = (int32_t)barred.size();
    c.barred_steps = random.below(2);
    int32_t first = 0;
    for (const Variant& v : variants) {
      OwnContext context(*v.kernels, 1);
      int32_t token = -2;
      if (!check(dso_choose(context.c, logits.data(), vocab, &c, 0, nullptr, &token) == 0, "choose: %s", dso_last_error()))
        return;
      check(token >= -1 && token < vocab, "%s: token %d of %d", v.name.c_str(), token, vocab);
      const bool chose_barred = c.barred_steps > 0 && std::find(barred.begin(), barred.end(), token) != barred.end();
      check(!chose_barred, "%s: token %d is barred", v.name.c_str(), token);
      if (&v == &variants[0]) first = token;
      check(token == first, "%s chooses %d, %s %d", v.name.c_str(), token, variants[0].name.c_str(), first);
    }
    ++(first < 0 ? undecided : decided);
  }
  check(decided > rounds(200) && undecided > rounds(20), "%d decided, %d undecided", decided, undecided);
}

static void test_a_call_equals_single_steps() {
  Spec spec;
  for (const Variant& v : ::vector_variants()) {
    Model model(spec, *v.kernels, 2);
    const dso_cache_shape shape{DSO_KV_F32, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr};
    dso_cache one(*v.kernels, shape, 8), several(*v.kernels, shape, 8);
    const int32_t rows = 3, steps = 20;
    DecodeBatch a(model, rows, 0, &one), b(model, rows, 0, &several);
    Random random(3);
    std::vector<double> numbers((size_t)steps);
    for (double& x : numbers) x = random.uniform();
    std::vector<int32_t> text = {1, 2, 3}, expected;
    std::vector<dso_choice> choices((size_t)rows, greedy());
    choices[1].temperature = 1;
    choices[1].top_k = 30;
    choices[1].numbers = numbers.data();
    choices[2].repetition = 1.5f;
    choices[2].tokens = text.data();
    choices[2].n_tokens = 3;
    std::vector<std::vector<int32_t>> texts((size_t)rows, text);
    int32_t done = 0;
    std::vector<float> each;  // the logits of all steps
    for (bool certain = true; certain && done < steps; done += certain) {
      check(dso_plan_run(model.plan, &a.b) == 0, "run: %s", dso_last_error());
      each.insert(each.end(), a.logits.begin(), a.logits.end());
      std::vector<int32_t> row((size_t)rows);
      for (int32_t i = 0; i < rows; ++i) {
        dso_choice c = choices[(size_t)i];
        if (i == 2) c.tokens = texts[2].data(), c.n_tokens = (int32_t)texts[2].size();
        dso_choose(model.context.c, a.logits.data() + i * spec.vocab, spec.vocab, &c, done, nullptr, &row[(size_t)i]);
        certain = certain && row[(size_t)i] >= 0;
        texts[(size_t)i].push_back(row[(size_t)i]);
        a.ids[(size_t)i] = row[(size_t)i];
        ++a.positions[(size_t)i];
        ++a.lengths[(size_t)i];
      }
      if (certain) expected.insert(expected.end(), row.begin(), row.end());
    }
    std::vector<int32_t> tokens((size_t)(rows * steps), -5);
    dso_decode d{};
    d.steps = steps;
    d.seconds = 60;
    d.choices = choices.data();
    d.tokens = tokens.data();
    check(dso_plan_decode(model.plan, &b.b, &d) == 0, "decode: %s", dso_last_error());
    check(d.done == done && d.undecided == (done < steps), "%d steps of %d, undecided %d", d.done, done, d.undecided);
    check(std::equal(expected.begin(), expected.end(), tokens.begin()), "%s: other tokens than in single steps",
          v.name.c_str());
    check(memcmp(a.logits.data(), b.logits.data(), 4 * a.logits.size()) == 0, "other logits than in single steps");

    // What ends a call: a token, the time.
    const int32_t stop = expected[(size_t)(4 * rows)];
    const size_t at = (size_t)(std::find(expected.begin(), expected.end(), stop) - expected.begin()) / (size_t)rows;
    d.stops = &stop;
    d.n_stops = 1;
    check(dso_plan_decode(model.plan, &b.b, &d) == 0 && d.done == (int32_t)at + 1, "stops after %d steps", d.done);
    d.n_stops = 0;
    d.seconds = 0;
    check(dso_plan_decode(model.plan, &b.b, &d) == 0 && d.done == 1, "%d steps in no time", d.done);
    d.seconds = 60;
    check(dso_plan_decode(model.plan, &b.b, &d) == 0 && d.done == done, "%d steps", d.done);
    std::vector<float> kept(each.size() + 1, -7);  // and one more, which nothing may write
    b.b.logits = kept.data();
    d.keep_logits = 1;
    check(dso_plan_decode(model.plan, &b.b, &d) == 0 && d.done == done, "%d steps with kept logits", d.done);
    check(memcmp(kept.data(), each.data(), 4 * each.size()) == 0 && kept.back() == -7, "the logits of a step are not kept");
  }
}

static void test_arguments() {
  Spec spec;
  Model model(spec, *::variants()[0].kernels, 1);
  const dso_cache_shape shape{DSO_KV_F32, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr};
  dso_cache cache(model.kernels, shape, 8);
  DecodeBatch good(model, 2, 0, &cache);
  std::vector<dso_choice> choices(2, greedy());
  std::vector<int32_t> tokens(8);
  dso_decode d{};
  d.steps = 4;
  d.choices = choices.data();
  d.tokens = tokens.data();
  auto bad = [&](const char* words, auto change) {
    dso_batch b = good.b;
    dso_decode other = d;
    std::vector<dso_choice> own = choices;
    other.choices = own.data();
    change(b, other, own);
    refuses(dso_plan_decode(model.plan, &b, &other), DSO_EINVAL, words, words);
  };
  using Choices = std::vector<dso_choice>;
  bad("steps is 0", [](dso_batch&, dso_decode& o, Choices&) { o.steps = 0; });
  bad("keep_logits is 2", [](dso_batch&, dso_decode& o, Choices&) { o.keep_logits = 2; });
  bad("n_stops", [](dso_batch&, dso_decode& o, Choices&) { o.n_stops = 1; });
  bad("tokens is NULL", [](dso_batch&, dso_decode& o, Choices&) { o.tokens = nullptr; });
  bad("batch.R", [](dso_batch& b, dso_decode&, Choices&) { b.R = 1; });
  bad("logits is NULL", [](dso_batch& b, dso_decode&, Choices&) { b.logits = nullptr; });
  bad("hidden", [](dso_batch& b, dso_decode&, Choices&) { b.hidden = b.logits; });
  bad("last_hidden is NULL", [](dso_batch& b, dso_decode&, Choices&) { b.states = b.logits; });
  bad("choices[1].n_tokens", [&](dso_batch&, dso_decode& o, Choices& c) {
    o.token_of = tokens.data();
    c[1].tokens = tokens.data();
    c[1].n_tokens = 1;
  });
  bad("choices[1].temperature", [](dso_batch&, dso_decode&, Choices& c) { c[1].temperature = NAN; });
  bad("choices[0].numbers", [](dso_batch&, dso_decode&, Choices& c) { c[0].temperature = 1; });
  bad("choices[0].noise_stride", [](dso_batch& b, dso_decode&, Choices& c) { c[0].noise = b.logits; });
  bad("choices[0].tokens", [](dso_batch&, dso_decode&, Choices& c) { c[0].n_tokens = 1; });
  good.phase[1] = DSO_PHASE_PREFILL;
  bad("phase[1]", [](dso_batch&, dso_decode&, Choices&) {});
  good.phase[1] = DSO_PHASE_DECODE;
  good.ids[0] = spec.vocab;
  bad("token_ids[0]", [](dso_batch&, dso_decode&, Choices&) {});
  refuses(dso_plan_decode(nullptr, &good.b, &d), DSO_EINVAL, "plan is NULL", "plan");
  refuses(dso_plan_decode(model.plan, nullptr, &d), DSO_EINVAL, "batch is NULL", "batch");
  refuses(dso_plan_decode(model.plan, &good.b, nullptr), DSO_EINVAL, "decode is NULL", "decode");
}

int main() {
  test_variants_choose_the_same();
  test_a_call_equals_single_steps();
  test_arguments();
  return report("choice");
}
