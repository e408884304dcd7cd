// Speed of attention on one thread: decode in GB/s of cache read, compared with plain loads of the same memory, and prefill in
// GFLOP/s (four operations per visible pair of query and key and per dimension). Best of several runs. Also the cost of the
// attention modes at 4K to 32K tokens: all heads of a row, one thread. Usage: bench_attention [variant]. Prints a table, then
// one line of JSON.
#include <algorithm>

#include "cache.hpp"
#include "kv_fixture.hpp"
#include "plan_parts.hpp"
#include "read_memory.hpp"
#include "timing.hpp"

struct Shape {
  int32_t kv_heads, group, head_dim;
};

struct Case {
  const Variant& variant;
  Shape shape;
  int32_t type;
  Cache cache;
  std::vector<float> q;
  Buffer scratch;

  Case(const Variant& v, Shape s, int32_t type, int64_t tokens, int64_t rows, Random& random)
      : variant(v),
        shape(s),
        type(type),
        cache(*v.kernels, type, s.kv_heads, s.head_dim, tokens, random),
        q(normal((size_t)(rows * width()), 1, random)),
        scratch(v.kernels->attn_scratch) {
    const std::vector<float> x = normal((size_t)(256 * cache.width()), 1, random);
    for (int64_t t = 0; t < tokens; t += 256) cache.write(t, std::min<int64_t>(256, tokens - t), x.data(), x.data());
  }
  int64_t width() const { return (int64_t)shape.kv_heads * shape.group * shape.head_dim; }
  float scale() const { return 1.0f / std::sqrt((float)shape.head_dim); }
};

// Speed of plain loads of the same memory on one thread.
static double read_speed(Buffer& memory) {
  const ReadMemory read = widest_reads();
  const size_t bytes = memory.size() / kReadStride * kReadStride;
  const double t = best([&] {
    volatile int64_t result = read(memory.get(), memory.get() + bytes);
    (void)result;
  });
  return (double)memory.size() / t * 1e-9;
}

// Enough sequences of 4,096 tokens to exceed the last-level cache.
static void decode(const Variant& v, Shape s, int32_t type, std::string& json) {
  constexpr int64_t context = 4096;
  Random random(4);
  const int64_t one = v.kernels->kv_layer_bytes(type, s.kv_heads, s.head_dim) * context / 32, sequences = (96 << 20) / one + 1;
  Case c(v, s, type, sequences * context, 1, random);
  const int64_t part = s.head_dim + 16;
  std::vector<float> parts((size_t)(context / attn_chunk * s.group * part)), out((size_t)c.width());
  const double t = best([&] {
    for (int64_t i = 0; i < sequences; ++i) {
      const KvView view = {c.cache.view.base, c.cache.view.block_stride, c.cache.view.table + i * context / 32};
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const float* q = c.q.data() + h * s.group * s.head_dim;
        for (int64_t k = 0; k < context / attn_chunk; ++k)
          v.kernels->attn_decode_chunk(c.cache.layout, view, h, q, c.width() * 4, s.group, 0, 1, context - 1, VisibleTokens{},
                                       Scores{c.scale()}, k, parts.data() + k * s.group * part, c.scratch.get());
        for (int64_t g = 0; g < s.group; ++g)
          v.kernels->attn_merge(parts.data() + g * part, s.group * part, context / attn_chunk, s.head_dim, nullptr,
                                out.data() + (h * s.group + g) * s.head_dim);
      }
    }
  });
  const double speed = (double)(one * sequences) / t * 1e-9, limit = read_speed(c.cache.memory);
  printf("%-12s decode  %-4s %2d/%d x %-3d %7.1f GB/s  %3.0f%% of %.1f\n", v.name.c_str(), kv_name(type), s.kv_heads * s.group,
         s.kv_heads, s.head_dim, speed, 100 * speed / limit, limit);
  char line[256];
  snprintf(line, sizeof line,
           "%s{\"isa\":\"%s\",\"family\":\"decode\",\"kv\":\"%s\",\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"gbs\":%.2f,"
           "\"limit_gbs\":%.2f}",
           json.empty() ? "" : ",", v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, speed, limit);
  json += line;
}

static void prefill(const Variant& v, Shape s, int32_t type, std::string& json) {
  constexpr int64_t context = 4096, rows = 128;
  Random random(5);
  Case c(v, s, type, context + rows, rows, random);
  std::vector<float> out((size_t)(rows * c.width()));
  const double t = best([&] {
    for (int64_t h = 0; h < s.kv_heads; ++h)
      for (int64_t r = 0; r < rows; r += attn_rows) {
        const int64_t at = h * s.group * s.head_dim;
        v.kernels->attn_prefill(c.cache.layout, c.cache.view, h, c.q.data() + at, c.width() * 4, s.group, r, r + attn_rows,
                                context, VisibleTokens{}, Scores{c.scale()}, nullptr, out.data() + at, c.width() * 4,
                                c.scratch.get());
      }
  });
  const double pairs = (double)rows * context + rows * (rows + 1) / 2.0, speed = 4 * pairs * (double)c.width() / t * 1e-9;
  printf("%-12s prefill %-4s %2d/%d x %-3d %7.1f GFLOP/s\n", v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads,
         s.head_dim, speed);
  char line[256];
  snprintf(
      line, sizeof line,
      ",{\"isa\":\"%s\",\"family\":\"prefill\",\"kv\":\"%s\",\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,\"gflops\":%.1f}",
      v.name.c_str(), kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, speed);
  json += line;
}

// Rows after `context` tokens: a step's attention (and the block choice before it) as run by a plan. Neighboring rows have
// similar queries, as in a text.
struct Mode {
  const char* name;
  int32_t window, sinks, top_k;
};

static void mode(const Variant& v, Shape s, int32_t type, int32_t context, bool decodes, const Mode& m, std::string& json) {
  const int32_t rows = decodes ? 1 : 128, q = s.kv_heads * s.group * s.head_dim, blocks = (context + rows + 31) / 32;
  Random random(6);
  OwnContext c(*v.kernels, 1);
  dso_cache cache(*v.kernels, {type, 1, s.kv_heads, s.head_dim, 0, 0, 0, 1, nullptr}, blocks);
  std::vector<int32_t> table;
  for (int32_t b = 0; b < blocks; ++b) table.push_back(b);
  for (int32_t b = 0; b < blocks; ++b) {
    const std::vector<float> x = normal((size_t)(32 * s.kv_heads * s.head_dim), 1, random);
    v.kernels->kv_write(cache.layout(0), cache.view(0, table.data()), 32 * b, 32, x.data(), 4 * s.kv_heads * s.head_dim,
                        x.data(), 4 * s.kv_heads * s.head_dim, 0, s.kv_heads);
    v.kernels->kv_summarize(cache.layout(0), cache.view(0, table.data()), b);
  }
  const std::vector<float> base = normal((size_t)q, 1, random);
  std::vector<float> x = normal((size_t)rows * q, 0.5f, random);
  for (size_t i = 0; i < x.size(); ++i) x[i] += base[i % base.size()];

  std::vector<std::unique_ptr<Buffer>> keep;
  const dso_weight embedding = packed_weight(c.c, DSO_F32, std::vector<float>((size_t)q), 0, 1, q, keep);
  std::vector<dso_slot> slots = {
      {DSO_SLOT_F32, q, 0, 0}, {DSO_SLOT_F32, s.kv_heads * std::max(1, m.top_k), 0, 0}, {DSO_SLOT_F32, q, 0, 0}};
  std::vector<dso_step> steps = {step_of(DSO_OP_EMBEDDING, {}, {0}, {0})};
  if (m.top_k > 0) steps.push_back(step_of(DSO_OP_BLOCK_CHOOSE, {0}, {1}));
  steps.push_back(step_of(DSO_OP_ATTENTION, m.top_k > 0 ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0}, {2}));
  for (size_t i = 1; i < steps.size(); ++i) {
    steps[i].heads = s.kv_heads * s.group, steps[i].kv_heads = s.kv_heads, steps[i].head_dim = s.head_dim,
    steps[i].top_k = m.top_k;
    const bool choice = steps[i].op == DSO_OP_BLOCK_CHOOSE;
    if (m.top_k == 0 || choice) steps[i].window = m.window, steps[i].sinks = m.sinks;
    steps[i].scale = 1.0f / std::sqrt((float)s.head_dim);
  }
  dso_plan* plan = nullptr;
  check(dso_plan_create(c.c, steps.data(), (int32_t)steps.size(), slots.data(), 3, &embedding, 1, 1, &plan) == 0, "%s",
        dso_last_error());
  const int32_t phase = decodes ? DSO_PHASE_DECODE : DSO_PHASE_PREFILL;
  dso_batch b{};
  b.T = rows, b.S = 1, b.max_blocks = blocks, b.query_len = &rows, b.context_len = &context, b.phase = &phase,
  b.block_table = table.data();
  b.inputs_embeds = x.data(), b.cache = &cache;
  double least = 1e9, choose = 0;
  for (double spent = 0; spent < 0.3;) {
    double part[3] = {};
    int64_t runs;
    dso_plan_set_timing(plan, 1);
    const double start = seconds();
    check(dso_plan_run(plan, &b) == 0, "%s", dso_last_error());
    spent += seconds() - start;
    dso_plan_timing(plan, part, &runs);
    const double t = part[1] + part[2];
    if (t < least) least = t, choose = m.top_k > 0 ? part[1] : 0;
  }
  dso_plan_destroy(plan);
  const double seen = m.top_k > 0 ? 32.0 * m.top_k : m.window > 0 ? m.window + m.sinks : context + rows / 2.0;
  const double row = least / rows * 1e9, speed = 4 * seen * q / row;
  printf("%-12s %-7s %-8s %-4s %2d/%d x %-3d %6d tokens: %9.0f ns a row (choice %7.0f), %6.1f GFLOP/s\n", v.name.c_str(),
         decodes ? "decode" : "prefill", m.name, kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim, context, row,
         choose / rows * 1e9, speed);
  char line[256];
  snprintf(line, sizeof line,
           ",{\"isa\":\"%s\",\"family\":\"%s\",\"mode\":\"%s\",\"kv\":\"%s\",\"heads\":%d,\"kv_heads\":%d,\"head_dim\":%d,"
           "\"tokens\":%d,\"row_ns\":%.0f,\"choice_ns\":%.0f}",
           v.name.c_str(), decodes ? "decode" : "prefill", m.name, kv_name(type), s.kv_heads * s.group, s.kv_heads, s.head_dim,
           context, row, choose / rows * 1e9);
  json += line;
}

int main(int argc, char** argv) {
  std::string json;
  for (const Variant& v : variants()) {
    if (argc > 1 && v.name != argv[1]) continue;
    for (const Shape s : {Shape{2, 6, 128}, Shape{3, 3, 64}, Shape{8, 1, 64}})
      for (int type : {DSO_KV_F32, DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4}) {
        decode(v, s, type, json);
        prefill(v, s, type, json);
      }
    for (const Shape s : {Shape{3, 3, 64}, Shape{2, 6, 128}, Shape{16, 1, 64}})
      for (int type : {DSO_KV_BF16, DSO_KV_INT8, DSO_KV_INT4})
        for (bool decodes : {false, true})
          for (const Mode& m : {Mode{"flash", 0, 0, 0}, Mode{"sliding", 4096, 4, 0}, Mode{"sparse", 512, 4, 64}})
            for (int32_t context : {4096, 16384, 32768}) mode(v, s, type, context, decodes, m, json);
  }
  printf("[%s]\n", json.c_str());
  return failures ? 1 : 0;
}
