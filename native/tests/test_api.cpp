// The C interface: every invalid call returns its code and a message that names the culprit, and changes nothing.
// test_matrix_api.cpp: functions outside plans. test_cache_api.cpp: the cache.
#include <cmath>
#include <thread>

#include "plan_fixture.hpp"
#include "scalar_kernels.hpp"

namespace {

void contexts() {
  dso_context* c = nullptr;
  const std::string choices = std::string("unknown ISA \"sse9\"; choose one of ") + dso_isa_name(0);
  refuses(dso_context_create("sse9", 1, &c), DSO_EISA, choices.c_str(), "unknown ISA");
  check(c == nullptr, "a failed call left a context");
  refuses(dso_context_create(nullptr, 1, nullptr), DSO_EINVAL, "out is NULL", "no out");
  refuses(dso_context_create(nullptr, 5000, &c), DSO_EINVAL, "threads is 5000", "too many threads");
  check(dso_isa_runs_here("sse9") == -1 && dso_isa_runs_here(nullptr) == -1, "unknown names run nowhere");
  check(dso_isa_name(-1) == nullptr && dso_isa_name(dso_isa_count()) == nullptr, "names out of range");
  const char* best = nullptr;
  for (int i = 0; i < dso_isa_count(); ++i) {
    const char* name = dso_isa_name(i);
    if (dso_isa_runs_here(name) == 1) {
      if (strcmp(name, "amx-emulated") != 0) best = name;
      if (!check(dso_context_create(name, 2, &c) == 0, "%s: %s", name, dso_last_error())) continue;
      check(strcmp(dso_context_isa(c), name) == 0, "%s: forced, got %s", name, dso_context_isa(c));
      check(dso_context_threads(c) == 2, "%s: %d threads", name, dso_context_threads(c));
      dso_context_destroy(c);
    } else {
      refuses(dso_context_create(name, 2, &c), DSO_EISA, name, "an ISA that cannot run");
      check(strstr(dso_last_error(), "lacks") || strstr(dso_last_error(), "not in this build"), "%s: does not say why: %s",
            name, dso_last_error());
    }
  }
  if (!check(best && dso_context_create(nullptr, 0, &c) == 0, "%s", dso_last_error())) return;
  check(strcmp(dso_context_isa(c), best) == 0, "the best is %s, got %s", best, dso_context_isa(c));
  check(dso_context_threads(c) == dso_default_threads(), "default threads");
  dso_context_destroy(c);
  const std::string cpu = dso_cpu_description();
  for (const char* key : {"\"vendor\"", "\"model\"", "\"features\"", "\"caches\"", "\"cores\""})
    check(cpu.find(key) != std::string::npos, "%s lacks %s", cpu.c_str(), key);
}

void bandwidth() {
  for (int threads : {1, 3}) {
    dso_context* c = nullptr;
    if (!check(dso_context_create(nullptr, threads, &c) == 0, "%s", dso_last_error())) return;
    double found = 0;
    refuses(dso_read_bandwidth(c, 1000, 0, &found), DSO_EINVAL, "bytes is 1000", "too little to read");
    refuses(dso_read_bandwidth(c, 1 << 20, -1, &found), DSO_EINVAL, "seconds is -1", "negative time");
    refuses(dso_read_bandwidth(c, 1 << 20, NAN, &found), DSO_EINVAL, "seconds is", "no time");
    refuses(dso_read_bandwidth(c, INT64_C(1) << 60, 0, &found), DSO_ENOMEM, "could not be allocated", "too much to read");
    refuses(dso_read_bandwidth(c, 1 << 20, 0, nullptr), DSO_EINVAL, "bytes_per_second is NULL", "no place for it");
    check(found == 0, "a failed call left %g", found);
    for (int64_t bytes : {1 << 20, (3 << 20) + 77}) {
      check(dso_read_bandwidth(c, bytes, 0, &found) == 0, "%s", dso_last_error());
      check(found > 1e7 && found < 1e14, "%d threads read %g bytes a second", threads, found);
    }
    const std::vector<uint8_t> first((1 << 20) + 64), second(4096), third(77);
    const void* starts[] = {first.data(), second.data() + 1, third.data()};  // of any alignment
    const int64_t sizes[] = {(1 << 20) + 64, 4095, 77}, negative[] = {-1, 4095, 77};
    found = 0;
    refuses(dso_read_bandwidth_of(c, starts, sizes + 1, 2, 0, &found), DSO_EINVAL, "must be at least", "too little to read");
    refuses(dso_read_bandwidth_of(c, starts, negative, 3, 0, &found), DSO_EINVAL, "-1 bytes", "a negative size");
    refuses(dso_read_bandwidth_of(c, nullptr, sizes, 3, 0, &found), DSO_EINVAL, "starts is NULL", "no regions");
    refuses(dso_read_bandwidth_of(c, starts, sizes, 3, 0, nullptr), DSO_EINVAL, "bytes_per_second is NULL", "no place for it");
    check(found == 0, "a failed call left %g", found);
    check(dso_read_bandwidth_of(c, starts, sizes, 3, 0, &found) == 0, "%s", dso_last_error());
    check(found > 1e7 && found < 1e14, "%d threads read %g bytes a second of regions", threads, found);
    dso_context_destroy(c);
  }
}

void errors_are_per_thread() {
  dso_context_create("sse9", 1, nullptr);
  dso_context* c;
  dso_context_create("sse9", 1, &c);
  std::thread([] { check(dso_last_error()[0] == '\0', "another thread's error"); }).join();
  check(strstr(dso_last_error(), "sse9"), "this thread's error is gone");
}

void sizes() {
  check(dso_tile_bytes(DSO_INT4) == 288 && dso_tile_bytes(77) == -1 && dso_tile_bytes(DSO_VECTOR) == -1, "tile bytes");
  check(dso_packed_bytes(DSO_BF16, 17, 33) == 4 * 1024, "a started tile is a whole tile");
  check(dso_packed_bytes(DSO_BF16, 0, 33) == -1 && dso_packed_bytes(DSO_BF16, -5, 33) == -1 &&
            dso_packed_bytes(DSO_F32, INT64_MAX, INT64_MAX) == -1,
        "invalid shapes");
  check(dso_tile_bytes(DSO_Q4_K) == 296 && dso_packed_bytes(DSO_Q4_K, 17, 512) == 2 * 16 * 296, "superblocks");
  check(dso_packed_bytes(DSO_Q4_K, 17, 288) == -1 && dso_packed_bytes(DSO_Q5_0, 17, 33) == 4 * 352, "columns of superblocks");
  for (int width : {1, 31, 32, 33, 576, 1000})
    for (int kind : {DSO_SLOT_F32, DSO_SLOT_BF16, DSO_SLOT_Q8, DSO_SLOT_Q16})
      check(dso_row_bytes(kind, width) == (int64_t)::row_bytes(kind, width), "row_bytes(%d, %d) is %ld", kind, width,
            (long)dso_row_bytes(kind, width));
  check(dso_row_bytes(9, 32) == -1 && dso_row_bytes(DSO_SLOT_Q8, 0) == -1 && dso_row_bytes(DSO_SLOT_Q8, -1) == -1,
        "invalid rows");
}

// ---- plans: one error at a time in a valid plan
void plans() {
  Model m(Spec(), scalar::table, 2);
  auto create = [&](const char* words, const char* what, auto&& spoil) {
    std::vector<dso_step> steps = m.steps;
    std::vector<dso_slot> slots = m.slots;
    std::vector<dso_weight> weights = m.weights;
    spoil(steps, slots, weights);
    dso_plan* plan = nullptr;
    refuses(dso_plan_create(m.context.c, steps.data(), (int32_t)steps.size(), slots.data(), (int32_t)slots.size(),
                            weights.data(), (int32_t)weights.size(), m.spec.vocab, &plan),
            DSO_EINVAL, words, what);
    check(plan == nullptr, "%s: left a plan", what);
    dso_plan_destroy(plan);
  };
  auto step_of = [&](int op) {
    for (size_t i = 0; i < m.steps.size(); ++i)
      if (m.steps[i].op == op) return i;
    abort();
  };
  using S = std::vector<dso_step>&;
  using L = std::vector<dso_slot>&;
  using W = std::vector<dso_weight>&;
  const size_t linear = step_of(DSO_OP_LINEAR), attention = step_of(DSO_OP_ATTENTION), gate = step_of(DSO_OP_GATE_UP),
               rope = step_of(DSO_OP_ROPE_CACHE);
  create("op 99 is unknown", "op", [&](S s, L, W) { s[0].op = 99; });
  create("step 0 (EMBEDDING): out[0] is slot 1000", "slot index", [&](S s, L, W) { s[0].out[0] = 1000; });
  create("in[1] is 0, must be -1", "extra input", [&](S s, L, W) { s[0].in[1] = 0; });
  create("w[0] is weight 1000", "weight index", [&](S s, L, W) { s[0].w[0] = 1000; });
  create("w[0] is weight -1", "no weight", [&](S s, L, W) { s[0].w[0] = -1; });
  create("kind 9 is unknown", "slot kind", [&](S, L l, W) { l[0].kind = 9; });
  create("width is -1", "slot width", [&](S, L l, W) { l[0].width = -1; });
  create("must have width 80", "width against weight", [&](S, L l, W) { l[0].width = 81; });
  create("selected is 2", "selected", [&](S, L l, W) { l[0].selected = 2; });
  create("LOGITS must be", "logits width", [&](S, L l, W) {
    l.back().kind = DSO_SLOT_LOGITS;
    l.back().width = 3;
    l.back().selected = 1;
  });
  create("takes", "weight bytes", [&](S, L, W w) { w[0].bytes -= 1; });
  create("data is NULL", "weight data", [&](S, L, W w) { w[0].data = nullptr; });
  create("format 55", "format", [&](S, L, W w) { w[0].format = 55; });
  create("a matrix of -3 x 80", "negative rows", [&](S, L, W w) { w[0].rows = -3; });
  create("must be a VECTOR", "matrix for vector", [&](S s, L, W) { s[1].w[0] = 0; });
  create("columns, but in[0] has width", "columns of w[1]",
         [&](S s, L, W w) { w[(size_t)s[linear].w[1]] = w[(size_t)s[gate + 1].w[0]]; });
  create("which no earlier step writes", "read before written", [&](S s, L, W) { std::swap(s[linear], s[gate]); });
  create("the same as another output", "two outs, one slot", [&](S s, L, W) { s[linear].out[2] = s[linear].out[1]; });
  create("which F32 weights do not support", "activation kind",
         [&](S s, L l, W) { l[(size_t)s[linear].in[0]].kind = DSO_SLOT_BF16; });
  create("heads 5 is not a multiple of kv_heads 2", "group", [&](S s, L, W) { s[attention].heads = 5; });
  create("window is -1", "window", [&](S s, L, W) { s[attention].window = -1; });
  create("layer is -1", "layer", [&](S s, L, W) { s[attention].layer = -1; });
  for (int d : {0, 17, 514}) create("must be even and at most 512", "head_dim", [&](S s, L, W) { s[attention].head_dim = d; });
  create("an earlier step has 2 and 16", "two cache shapes", [&](S s, L, W) { s[attention].kv_heads = 1; });
  create("sinks -1", "sinks", [&](S s, L, W) { s[attention].sinks = -1; });
  create("sinks is 4 with no window", "sinks alone", [&](S s, L, W) { s[attention].sinks = 4; });
  create("sinks is 4 with the EAGER flag", "eager sinks",
         [&](S s, L, W) { s[attention].window = 9, s[attention].sinks = 4, s[attention].flags = DSO_FLAG_EAGER; });
  create("top_k is 4 with the EAGER flag", "eager blocks",
         [&](S s, L, W) { s[attention].top_k = 4, s[attention].flags = DSO_FLAG_EAGER; });
  create("top_k is 4 with a window", "window of blocks", [&](S s, L, W) { s[attention].top_k = 4, s[attention].window = 9; });
  create("in[1] is slot -1", "no blocks", [&](S s, L, W) { s[attention].top_k = 4; });
  create("in[1] must have width 8", "blocks of another width",
         [&](S s, L, W) { s[attention].top_k = 4, s[attention].in[1] = s[attention].in[0]; });
  create("slot 3, is an input", "attention in place", [&](S s, L, W) { s[attention].out[0] = s[attention].in[0]; });
  create("is both an input and an out", "rope over its key", [&](S s, L, W) {
    s[rope].heads = s[rope].kv_heads;  // all of one width
    s[rope].in[0] = s[rope].in[2];
    s[rope].out[0] = s[rope].in[1];
  });
  create("they must be equal", "gate and up", [&](S s, L, W) { s[gate].w[1] = s[gate + 1].w[0]; });
  create("flags are 64", "flags", [&](S s, L, W) { s[attention].flags = 64; });
  create("eps is", "eps", [&](S s, L, W) { s[step_of(DSO_OP_ADD_RMS_NORM)].eps = NAN; });
  create("must hold the selected rows", "select into all rows",
         [&](S s, L l, W) { l[(size_t)s[step_of(DSO_OP_SELECT_ROWS)].out[0]].selected = 0; });
  dso_plan* plan = nullptr;
  refuses(dso_plan_create(nullptr, m.steps.data(), 1, m.slots.data(), 1, nullptr, 0, 5, &plan), DSO_EINVAL, "context is NULL",
          "no context");
  refuses(dso_plan_create(m.context.c, nullptr, 1, m.slots.data(), 1, nullptr, 0, 5, &plan), DSO_EINVAL, "steps", "no steps");
  refuses(dso_plan_run(nullptr, nullptr), DSO_EINVAL, "plan is NULL", "no plan");
  refuses(dso_plan_run(m.plan, nullptr), DSO_EINVAL, "batch is NULL", "no batch");
  check(dso_plan_buffer_bytes(m.plan, 10, 2) > 0 && dso_plan_buffer_bytes(m.plan, 20, 2) > dso_plan_buffer_bytes(m.plan, 10, 2),
        "buffer bytes grow");
  check(dso_plan_reserve(m.plan, 100, 10) == 0, "reserve: %s", dso_last_error());
  refuses(dso_plan_reserve(m.plan, -1, 0), DSO_EINVAL, "T is -1", "reserve");
}

// ---- batches: one error at a time; the logits must not be touched
void batches() {
  const Spec spec;
  Model m(spec, scalar::table, 2);
  dso_cache cache(m.kernels, {spec.kv_type, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr}, 4);
  dso_cache small(m.kernels, {spec.kv_type, 1, spec.kv_heads, spec.head_dim, 0, 0, 0, 0}, 4);
  dso_cache other(m.kernels, {spec.kv_type, spec.layers, 1, spec.head_dim, 0, 0, 0, 0}, 4);
  struct Data {
    std::vector<int32_t> ids{1, 2, 3}, positions{40, 0, 1}, query{1, 2}, context{40, 0}, phase{0, 1}, table{0, 1, 2, -1},
        rows{0, 2};
  };
  std::vector<float> logits((size_t)(2 * spec.vocab));
  auto run = [&](auto&& spoil) {
    Data d;
    std::fill(logits.begin(), logits.end(), 123.0f);
    dso_batch b{};
    b.T = 3;
    b.S = b.R = b.max_blocks = 2;
    b.token_ids = d.ids.data();
    b.positions = d.positions.data();
    b.query_len = d.query.data();
    b.context_len = d.context.data();
    b.phase = d.phase.data();
    b.block_table = d.table.data();
    b.logit_rows = d.rows.data();
    b.logits = logits.data();
    b.cache = &cache;
    spoil(b, d);
    return dso_plan_run(m.plan, &b);
  };
  using B = dso_batch&;
  using D = Data&;
  check(run([](B, D) {}) == 0 && logits[0] != 123.0f, "a good batch: %s", dso_last_error());
  auto bad = [&](const char* words, auto&& spoil) {
    refuses(run(spoil), DSO_EINVAL, words, words);
    check(logits[0] == 123.0f, "%s: wrote before it refused", words);
  };
  bad("batch.T is 0", [](B b, D) { b.T = 0; });
  bad("batch.S is 4", [](B b, D) { b.S = 4; });
  bad("batch.R is -1", [](B b, D) { b.R = -1; });
  bad("token_ids[1] is 150, but the vocabulary has 150", [](B, D d) { d.ids[1] = 150; });
  bad("token_ids[2] is -1", [](B, D d) { d.ids[2] = -1; });
  bad("token_ids and batch.inputs_embeds are both NULL", [](B b, D) { b.token_ids = nullptr; });
  bad("positions is NULL", [](B b, D) { b.positions = nullptr; });
  bad("query_len[1] is 0", [](B, D d) { d.query[1] = 0; });
  bad("query_len sums to 4, but T is 3", [](B, D d) { d.query[1] = 3; });
  bad("context_len[0] is -1", [](B, D d) { d.context[0] = -1; });
  bad("context_len[0] is 2147483647", [](B, D d) { d.context[0] = INT32_MAX; });
  bad("phase[0] is 2", [](B, D d) { d.phase[0] = 2; });
  bad("decode phase must come first", [](B, D d) { d.phase = {1, 0}; });
  bad("sequence 0 needs 3 blocks, but max_blocks is 2", [](B, D d) { d.context[0] = 64; });
  bad("block_table[0][1] is 4", [](B, D d) { d.table[1] = 4; });
  bad("block_table[1][0] is -3", [](B, D d) { d.table[2] = -3; });
  bad("block_table is NULL", [](B b, D) { b.block_table = nullptr; });
  bad("logit_rows[1] is 3", [](B, D d) { d.rows[1] = 3; });
  bad("must ascend", [](B, D d) { d.rows[0] = 2; });
  bad("logit_rows is NULL", [](B b, D) { b.logit_rows = nullptr; });
  bad("logits is NULL", [](B b, D) { b.logits = nullptr; });
  bad("cache is NULL", [](B b, D) { b.cache = nullptr; });
  bad("batch.cache has 1 layers", [&](B b, D) { b.cache = &small; });
  bad("kv_heads 1, head_dim 16", [&](B b, D) { b.cache = &other; });
  check(run([](B, D) {}) == 0, "good again: %s", dso_last_error());
}

// A block may be missing if no row sees it and every layer has a window.
void missing_blocks() {
  auto runs = [](bool first_full, int32_t missing, int32_t context) {
    Spec spec;
    spec.window = 40;
    spec.sinks = 33;
    spec.first_full = first_full;
    Model m(spec, scalar::table, 2);
    dso_cache cache(m.kernels, {spec.kv_type, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr}, 8);
    std::vector<int32_t> ids{1, 2, 3}, positions{0, 1, 2}, table{0, 1, 2, 3, 4, 5, 6, 7};
    table[(size_t)missing] = -1;
    const int32_t query = 3, phase = DSO_PHASE_PREFILL, row = 0;
    std::vector<float> logits((size_t)spec.vocab);
    dso_batch b{};
    b.T = 3, b.S = 1, b.R = 1, b.max_blocks = 8;
    b.token_ids = ids.data(), b.positions = positions.data(), b.query_len = &query, b.context_len = &context, b.phase = &phase;
    b.block_table = table.data(), b.logit_rows = &row, b.logits = logits.data(), b.cache = &cache;
    return dso_plan_run(m.plan, &b);
  };
  check(runs(false, 2, 200) == 0 && runs(false, 4, 200) == 0, "blocks between sinks and window: %s", dso_last_error());
  check(runs(false, 2, 135) == 0, "a block that ends where the window begins: %s", dso_last_error());
  refuses(runs(false, 2, 134), DSO_EINVAL, "block_table[0][2] is -1", "a window that begins in the block");
  refuses(runs(false, 1, 200), DSO_EINVAL, "block_table[0][1] is -1", "a block with a sink");
  refuses(runs(false, 5, 200), DSO_EINVAL, "block_table[0][5] is -1", "a block of the window");
  refuses(runs(true, 2, 200), DSO_EINVAL, "block_table[0][2] is -1", "a layer that sees all");
}

// A block table per group of layers: blocks may be missing in the group of a layer with a window only, and a table of a group
// has no effect on the layers of another.
void groups_of_layers() {
  std::vector<float> expected;
  auto runs = [&](const int32_t* groups, std::vector<int32_t> table) {
    Spec spec;
    spec.window = 40;
    spec.first_full = true;
    Model m(spec, scalar::table, 2);
    dso_cache cache(m.kernels, {spec.kv_type, spec.layers, spec.kv_heads, spec.head_dim, 0, 0, 0, 0, nullptr, groups}, 16);
    std::vector<int32_t> ids{1, 2, 3}, positions{0, 1, 2};
    const int32_t query = 3, phase = DSO_PHASE_PREFILL, row = 2, context = 200;
    std::vector<float> logits((size_t)spec.vocab);
    dso_batch b{};
    b.T = 3, b.S = 1, b.R = 1, b.max_blocks = 8;
    b.token_ids = ids.data(), b.positions = positions.data(), b.query_len = &query, b.context_len = &context, b.phase = &phase;
    b.block_table = table.data(), b.logit_rows = &row, b.logits = logits.data(), b.cache = &cache;
    const int32_t rc = dso_plan_run(m.plan, &b);
    if (expected.empty()) expected = logits;
    check(rc || logits == expected, "other logits");
    return rc;
  };
  const int32_t two[] = {0, 1};
  std::vector<int32_t> table{0, 1, 2, 3, 4, 5, 6, 7};
  check(runs(nullptr, table) == 0, "one group: %s", dso_last_error());
  table.insert(table.end(), {8, 9, 10, 11, 12, 13, 14, 15});
  check(runs(two, table) == 0, "two groups: %s", dso_last_error());
  for (int i = 8; i < 13; ++i) table[(size_t)i] = -1;
  check(runs(two, table) == 0, "without the blocks behind the window: %s", dso_last_error());
  table[13] = -1;
  refuses(runs(two, table), DSO_EINVAL, "block_table[0][5] is -1", "a block of the window");
  table[13] = 13, table[2] = -1;
  refuses(runs(two, table), DSO_EINVAL, "block_table[0][2] is -1", "a block of the group that sees all");
}

void context_goes_first() {  // the plan keeps the shared context alive
  const Spec spec;
  auto m = std::make_unique<Model>(spec, scalar::table, 2);
  dso_context_destroy(m->context.c);
  m->context.c = nullptr;
  Random random(1);
  Feeder feeder(*m, 4, random);
  Sequence s{{1, 2, 3}, 0, {}, {}};
  check(feeder.feed({{&s, 3, DSO_PHASE_PREFILL}}) == 0, "a plan after its context");
}

void many_callers() {  // two models on one context each, four threads: all get the results of a single thread
  const Spec spec;
  std::vector<std::unique_ptr<Model>> models;
  for (int i = 0; i < 2; ++i) models.push_back(std::make_unique<Model>(spec, scalar::table, 2));
  std::vector<std::vector<std::vector<float>>> results(4);
  std::vector<std::thread> callers;
  for (size_t c = 0; c < 4; ++c)
    callers.emplace_back([&, c] {
      Random random(c);
      Feeder feeder(*models[c % 2], 8, random);
      Sequence s{{}, 0, {}, {}};
      for (int i = 0; i < 40; ++i) s.tokens.push_back(i * 7 % spec.vocab);
      feeder.feed({{&s, 35, DSO_PHASE_PREFILL}});
      while (s.done < 40) feeder.feed({{&s, 1, DSO_PHASE_DECODE}});
      results[c] = s.logits;
    });
  for (std::thread& c : callers) c.join();
  for (size_t c = 1; c < 4; ++c) check(results[c] == results[0], "caller %zu got other logits", c);
}

}  // namespace

int main() {
  check(dso_abi_version() == DSO_ABI_VERSION, "ABI version");
  errors_are_per_thread();
  sizes();
  plans();
  batches();
  missing_blocks();
  groups_of_layers();
  context_goes_first();
  many_callers();
  contexts();
  bandwidth();
  return report("test_api");
}
