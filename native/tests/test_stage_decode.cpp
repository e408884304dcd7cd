// Decode steps of a model whose layers are divided among threads that stand for processes: the tokens and logits of the whole
// model, over socket pairs with small buffers and over TCP; what ends a call; links that fail; interrupted calls.
#include <signal.h>
#include <sys/time.h>

#include <functional>
#include <thread>

#include "decode_fixture.hpp"
#include "socket_pairs.hpp"

namespace {

Spec layers_of_three() {
  Spec spec;
  spec.fused = false;  // so that only slot 0, the hidden rows, is in use between two layers
  spec.layers = 3;
  return spec;
}

// Some of the whole model's layers, or what follows them. Steps 0 and 1 are the embedding and the table of RoPE.
class Part {
 public:
  Part(Model& model, int32_t first_layer, int32_t end_layer) : width(model.spec.hidden) {
    std::vector<size_t> ends{2};  // where layers begin: the second sum of residuals of each is its last step
    int sums = 0;
    for (size_t i = 0; i < model.steps.size(); ++i)
      if (model.steps[i].op == DSO_OP_ADD && ++sums % 2 == 0) ends.push_back(i + 1);
    const bool tail = first_layer == model.spec.layers;
    std::vector<dso_step> steps;
    if (first_layer == 0)
      steps.push_back(model.steps[0]);
    else
      steps.push_back(step_of(DSO_OP_STATE_IN, {}, {0}));
    if (!tail) steps.push_back(model.steps[1]);
    const size_t end = tail ? model.steps.size() : ends[(size_t)end_layer];
    for (size_t i = ends[(size_t)first_layer]; i < end; ++i)
      if (model.steps[i].op != DSO_OP_HIDDEN_OUT) steps.push_back(model.steps[i]);
    if (!tail) {
      steps.push_back(step_of(DSO_OP_HIDDEN_OUT, {0}, {}));
      steps.back().flags = DSO_FLAG_LAST;
    }
    check(dso_plan_create(model.context.c, steps.data(), (int32_t)steps.size(), model.slots.data(), (int32_t)model.slots.size(),
                          model.weights.data(), (int32_t)model.weights.size(), model.spec.vocab, &plan) == 0,
          "plan of layers %d to %d: %s", first_layer, end_layer, dso_last_error());
  }
  ~Part() { dso_plan_destroy(plan); }
  Part(const Part&) = delete;

  // The batch of layers: without logits.
  dso_batch batch(const DecodeBatch& whole, std::vector<float>& rows, dso_cache* cache) const {
    rows.resize((size_t)whole.b.S * (size_t)width);
    dso_batch b = whole.b;
    b.R = 0;
    b.logits = nullptr;
    b.logit_rows = nullptr;
    b.last_hidden = rows.data();
    b.cache = cache;
    return b;
  }

  const int32_t width;
  dso_plan* plan = nullptr;
};

dso_cache_shape shape_of(const Spec& spec) {
  return {DSO_KV_F32, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr};
}

// One layer and the tail here, one layer in each of `others` threads.
class Divided {
 public:
  Divided(int others, const std::function<Pair()>& connect, int32_t rows) : others(others), rows(rows) {
    const Spec spec = layers_of_three();
    for (int i = 0; i <= others; ++i) {
      models.push_back(std::make_unique<Model>(spec, kernels(), 1 + i % 2));  // the same weights in each
      caches.push_back(std::make_unique<dso_cache>(kernels(), shape_of(spec), 8));
      parts.push_back(std::make_unique<Part>(*models.back(), i, i == others ? spec.layers : i + 1));
      if (i > 0) pairs.push_back(connect());
    }
    for (const Pair& pair : pairs) links.push_back(pair.ends[0]);
    tail = std::make_unique<Part>(*models[0], spec.layers, spec.layers);
  }
  ~Divided() {
    for (const Pair& pair : pairs)
      for (int end : pair.ends) close(end);
  }
  static const Kernels& kernels() { return choose_kernels(nullptr); }

  int32_t follow(int other) {  // in a thread of its own
    std::vector<float> out;
    const DecodeBatch batch(*models[0], rows, 0, nullptr);
    const size_t i = (size_t)other + 1;
    const dso_batch b = parts[i]->batch(batch, out, caches[i].get());
    return dso_plan_follow(parts[i]->plan, &b, pairs[(size_t)other].ends[1]);
  }
  int32_t lead(DecodeBatch& batch, dso_decode& d, dso_stages* kept = nullptr) {
    std::vector<float> out;
    const dso_batch first = parts[0]->batch(batch, out, caches[0].get());
    dso_stages stages{parts[0]->plan, &first, links.data(), (int32_t)links.size(), -7};
    batch.b.cache = nullptr;
    const int32_t code = dso_plan_decode_stages(tail->plan, &batch.b, &d, &stages);
    if (kept) *kept = stages;
    return code;
  }
  // A call in all threads, which returns without an error in the others.
  int32_t decode(DecodeBatch& batch, dso_decode& d) {
    std::vector<std::thread> threads;
    for (int i = 0; i < others; ++i)
      threads.emplace_back([this, i] {
        const int32_t code = follow(i);
        check(code == 0, "process %d: %s", i + 1, dso_last_error());
      });
    const int32_t code = lead(batch, d);
    for (std::thread& t : threads) t.join();
    return code;
  }

  const int others;
  const int32_t rows;
  std::vector<std::unique_ptr<Model>> models;
  std::vector<std::unique_ptr<dso_cache>> caches;
  std::vector<std::unique_ptr<Part>> parts;
  std::vector<Pair> pairs;
  std::vector<int32_t> links;
  std::unique_ptr<Part> tail;
};

struct Call {
  explicit Call(int32_t rows, int32_t steps = 20) : choices((size_t)rows, greedy()), tokens((size_t)(rows * steps), -5) {
    d.steps = steps;
    d.seconds = 60;
    d.choices = choices.data();
    d.tokens = tokens.data();
  }
  std::vector<dso_choice> choices;
  std::vector<int32_t> tokens;
  dso_decode d{};
};

// Also that a call leaves the links as they were: another one follows on them.
void equals_the_whole_model() {
  for (const auto& connect : {local_pair, tcp_pair})
    for (int others : {1, 2})
      for (int32_t rows : {1, 3, 40}) {
        Model whole(layers_of_three(), Divided::kernels(), 2);
        dso_cache cache(Divided::kernels(), shape_of(whole.spec), 80);
        Divided divided(others, connect, rows);
        for (auto& own : divided.caches) own = std::make_unique<dso_cache>(Divided::kernels(), shape_of(whole.spec), 80);
        DecodeBatch one(whole, rows, 0, &cache), several(whole, rows, 0, nullptr);
        Call expected(rows), actual(rows);
        check(dso_plan_decode(whole.plan, &one.b, &expected.d) == 0, "decode: %s", dso_last_error());
        const auto same = [&](const char* what) {
          check(divided.decode(several, actual.d) == 0, "%s: %s", what, dso_last_error());
          check(actual.d.done == expected.d.done && actual.d.undecided == expected.d.undecided, "%s: %d steps, not %d", what,
                actual.d.done, expected.d.done);
          check(std::equal(expected.tokens.begin(), expected.tokens.begin() + expected.d.done * rows, actual.tokens.begin()),
                "%s: other tokens", what);
          check(memcmp(one.logits.data(), several.logits.data(), 4 * one.logits.size()) == 0, "%s: other logits", what);
        };
        same("all steps");
        if (expected.d.done < 3) continue;
        const int32_t stop = expected.tokens[(size_t)rows];
        for (Call* call : {&expected, &actual}) call->d.stops = &stop, call->d.n_stops = 1;
        check(dso_plan_decode(whole.plan, &one.b, &expected.d) == 0 && expected.d.done <= 2, "stop: %d", expected.d.done);
        same("a token that ends the call");
        for (Call* call : {&expected, &actual}) call->d.n_stops = 0, call->d.seconds = 0;
        check(dso_plan_decode(whole.plan, &one.b, &expected.d) == 0 && expected.d.done == 1, "time: %d", expected.d.done);
        same("the time");
      }
}

// A step that fails here ends the call in the others without an error.
void fails_here() {
  Divided divided(2, local_pair, 2);
  DecodeBatch batch(*divided.models[0], 2, 0, nullptr);
  Call call(2);
  batch.ids[0] = divided.models[0]->spec.vocab;
  refuses(divided.decode(batch, call.d), DSO_EINVAL, "token_ids[0]", "an invalid token");
  batch.ids[0] = 7;
  call.d.tokens = nullptr;
  refuses(divided.decode(batch, call.d), DSO_EINVAL, "tokens is NULL", "an invalid call");
  call.d.tokens = call.tokens.data();
  check(divided.decode(batch, call.d) == 0 && call.d.done > 0, "the next call: %s", dso_last_error());
}

// Something else than rows is not read: the next reader of the link finds it whole.
void another_message() {
  const uint8_t message[] = {0, 0, 0, 5, 0x80, 4, 'N', '.', 'x'};
  for (size_t size : {sizeof message, size_t(3)}) {
    Divided divided(2, tcp_pair, 1);
    DecodeBatch batch(*divided.models[0], 1, 0, nullptr);
    Call call(1);
    std::thread first([&] { check(divided.follow(0) == 0, "process 1: %s", dso_last_error()); });
    std::thread second([&] {
      check(write(divided.pairs[1].ends[1], message, size) == (ssize_t)size, "a message");
      if (size < sizeof message) {
        usleep(20000);
        shutdown(divided.pairs[1].ends[1], SHUT_WR);
      }
    });
    dso_stages stages{};
    refuses(divided.lead(batch, call.d, &stages), DSO_ELOST, "link 1 has ended", "another message");
    check(stages.lost == 1, "lost: %d", stages.lost);
    first.join();
    second.join();
    uint8_t found[sizeof message] = {};
    check(recv(divided.links[1], found, sizeof found, MSG_WAITALL) == (ssize_t)size && memcmp(found, message, size) == 0,
          "the message is not whole");
  }
}

void ended_links() {
  for (const auto& connect : {local_pair, tcp_pair}) {
    Divided divided(1, connect, 1);
    DecodeBatch batch(*divided.models[0], 1, 0, nullptr);
    Call call(1);
    std::thread other([&] { refuses(divided.follow(0), DSO_ELOST, "the first process", "its connection has ended"); });
    usleep(20000);
    shutdown(divided.links[0], SHUT_RDWR);
    other.join();
    dso_stages stages{};
    refuses(divided.lead(batch, call.d, &stages), DSO_ELOST, "link 0 has ended", "a connection that has ended");
    check(stages.lost == 0, "lost: %d", stages.lost);
  }
}

// Signals whose handlers return, while both sides wait for each other.
void interrupts() {
  struct sigaction action{};
  action.sa_handler = [](int) {};
  sigaction(SIGALRM, &action, nullptr);
  const itimerval often{{0, 300}, {0, 300}}, never{};
  setitimer(ITIMER_REAL, &often, nullptr);
  Divided divided(2, local_pair, 30);
  for (auto& own : divided.caches) own = std::make_unique<dso_cache>(Divided::kernels(), shape_of(layers_of_three()), 60);
  DecodeBatch batch(*divided.models[0], 30, 0, nullptr);
  for (int i = 0; i < rounds(20) && !failures; ++i) {
    Call call(30, 8);
    check(divided.decode(batch, call.d) == 0, "interrupted: %s", dso_last_error());
  }
  setitimer(ITIMER_REAL, &never, nullptr);
}

void refusals() {
  Divided divided(1, local_pair, 1);
  DecodeBatch batch(*divided.models[0], 1, 0, nullptr);
  Call call(1);
  std::vector<float> out;
  const dso_batch good = divided.parts[0]->batch(batch, out, divided.caches[0].get());
  const int32_t file = 0;
  using Change = std::function<void(dso_batch&, dso_stages&)>;
  const auto bad = [&](const char* words, const Change& change) {
    dso_batch layers = good;
    int32_t link = divided.links[0];
    dso_stages stages{divided.parts[0]->plan, &layers, &link, 1, 0};
    change(layers, stages);
    refuses(dso_plan_decode_stages(divided.tail->plan, &batch.b, &call.d, &stages), DSO_EINVAL, words, words);
  };
  bad("n_links is 0", [](dso_batch&, dso_stages& s) { s.n_links = 0; });
  bad("links is NULL", [](dso_batch&, dso_stages& s) { s.links = nullptr; });
  bad("not a connected socket", [&](dso_batch&, dso_stages& s) { s.links = &file; });
  bad("stages.first is NULL", [](dso_batch&, dso_stages& s) { s.first = nullptr; });
  bad("stages.batch is NULL", [](dso_batch&, dso_stages& s) { s.batch = nullptr; });
  bad("batch.R 1", [](dso_batch& b, dso_stages&) { b.R = 1; });
  bad("last_hidden is NULL", [](dso_batch& b, dso_stages&) { b.last_hidden = nullptr; });
  bad("states and inputs_embeds must be NULL", [](dso_batch& b, dso_stages&) { b.states = b.last_hidden; });
  bad("states and inputs_embeds must be NULL", [](dso_batch& b, dso_stages&) { b.inputs_embeds = b.last_hidden; });
  bad("batch.T is 2", [](dso_batch& b, dso_stages&) { b.T = b.S = 2; });
  dso_batch none = good;
  none.positions = nullptr;
  refuses(dso_plan_follow(divided.parts[1]->plan, &none, divided.links[0]), DSO_EINVAL, "positions", "no positions");
  refuses(dso_plan_follow(nullptr, &good, divided.links[0]), DSO_EINVAL, "plan is NULL", "no plan");
  refuses(dso_plan_follow(divided.parts[1]->plan, nullptr, divided.links[0]), DSO_EINVAL, "batch is NULL", "no batch");
  refuses(dso_plan_follow(divided.parts[1]->plan, &good, -1), DSO_EINVAL, "not a connected socket", "no socket");
}

}  // namespace

int main() {
  refusals();
  equals_the_whole_model();
  fails_here();
  another_message();
  ended_links();
  interrupts();
  return report("test_stage_decode");
}
