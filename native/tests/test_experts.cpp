// Experts on every variant and format: a row's bits are those of its own products, computed one by one, whatever other rows,
// grouping and threads; close to the sum in double; and the assignment of rows if routes are invalid.
#include "scalar_kernels.hpp"
// After check.hpp, whose size functions are an independent implementation of the layout.
#include "experts_fixture.hpp"

#include "expert_groups.hpp"

namespace {

// y of one row by its routes, each product separately: every plan must equal it bit for bit.
std::vector<float> plain(const MoeSpec& s, MoeWeights& weights, const Kernels& k, const float* x, const float* routes,
                         bool prefill) {
  const size_t up_bytes = ::packed_bytes(s.up_format, s.inner, s.hidden),
               down_bytes = ::packed_bytes(s.down_format, s.hidden, s.inner);
  Buffer scratch(k.linear_scratch), x_row(::row_bytes(s.up_kind, s.hidden)), h_row(::row_bytes(s.down_kind, s.inner));
  auto to_row = [&](int32_t kind, const float* from, int32_t width, Buffer& row) {
    if (kind == DSO_SLOT_F32)
      memcpy(row.get(), from, (size_t)width * 4);
    else
      k.convert(kind, from, 0, width, width, row.get());
  };
  const bool clamped = s.limit > 0;
  auto product = [&](int32_t format, int32_t rows, int32_t cols, const uint8_t* data, const float* bias, int32_t kind,
                     Buffer& row) {
    std::vector<float> y((size_t)rows);
    k.linear({format, rows, cols, data}, clamped ? bias : nullptr, kind, row.get(), (int64_t)row.size(), 1, prefill, 0,
             (rows + 15) / 16, y.data(), 4 * rows, scratch.get());
    return y;
  };
  to_row(s.up_kind, x, s.hidden, x_row);
  std::vector<float> y((size_t)s.hidden, 0);
  for (int32_t j = 0; j < s.top_k; ++j) {
    const size_t e = (size_t)routes[j];
    const size_t inner = (size_t)s.inner;
    std::vector<float> gate = product(s.up_format, s.inner, s.hidden, weights.gate_up->get() + 2 * e * up_bytes,
                                      weights.up_bias.data() + 2 * e * inner, s.up_kind, x_row);
    std::vector<float> up = product(s.up_format, s.inner, s.hidden, weights.gate_up->get() + (2 * e + 1) * up_bytes,
                                    weights.up_bias.data() + (2 * e + 1) * inner, s.up_kind, x_row);
    if (s.weighs)
      for (std::vector<float>* both : {&gate, &up}) k.scale(both->data(), routes[s.top_k + j], s.inner, both->data());
    if (clamped)
      k.clamped_swiglu(gate.data(), up.data(), s.inner, s.alpha, s.limit, 1.0f, gate.data());
    else
      k.swiglu(gate.data(), up.data(), s.inner, gate.data());
    to_row(s.down_kind, gate.data(), s.inner, h_row);
    k.add_scaled(product(s.down_format, s.hidden, s.inner, weights.down->get() + e * down_bytes,
                         weights.down_bias.data() + e * (size_t)s.hidden, s.down_kind, h_row)
                     .data(),
                 s.weighs ? 1 : routes[s.top_k + j], s.hidden, y.data());
  }
  return y;
}

bool same_row(const float* a, const float* b, int32_t n) {
  for (int32_t i = 0; i < n; ++i)
    if (!same(a[i], b[i])) return false;
  return true;
}

struct Formats {
  const char* name;
  int32_t up, up_kind, down, down_kind;
};
constexpr Formats kFormats[] = {
    {"f32", DSO_F32, DSO_SLOT_F32, DSO_F32, DSO_SLOT_F32},
    {"bf16", DSO_BF16, DSO_SLOT_BF16, DSO_BF16, DSO_SLOT_BF16},
    {"int8", DSO_INT8, DSO_SLOT_Q16, DSO_INT8, DSO_SLOT_Q16},
    {"int4", DSO_INT4, DSO_SLOT_Q8, DSO_INT4, DSO_SLOT_Q8},
    {"q4_1", DSO_Q4_1, DSO_SLOT_Q16, DSO_Q4_1, DSO_SLOT_Q16},
    {"int4, down in int8", DSO_INT4, DSO_SLOT_Q8, DSO_INT8, DSO_SLOT_Q16},
    {"fp8", DSO_FP8, DSO_SLOT_BF16, DSO_FP8, DSO_SLOT_BF16},
    {"bf16, up in int4", DSO_INT4, DSO_SLOT_Q8, DSO_BF16, DSO_SLOT_BF16},
};
struct Shape {
  int32_t hidden, inner, experts, top_k;
};

void equals_plain(const Kernels& k, const Formats& f, const Shape& shape, const std::vector<int32_t>& tokens,
                  std::vector<int> threads, int32_t flags, float limit = 0) {
  MoeSpec spec{shape.hidden, shape.inner, shape.experts, shape.top_k, f.up, f.up_kind, f.down, f.down_kind};
  spec.flags = flags & ~DSO_FLAG_WEIGH_INPUT;
  spec.weighs = flags & DSO_FLAG_WEIGH_INPUT;
  spec.alpha = 1.7f;
  spec.limit = limit;
  OwnContext packing(k, 1);
  MoeWeights weights(spec, random_matrices(packing.c));
  Random random(9);
  const int32_t most = *std::max_element(tokens.begin(), tokens.end());
  std::vector<float> x = normal((size_t)most * (size_t)shape.hidden, 1, random);
  x[3] = NAN;  // this row becomes NaN, and no other
  std::vector<std::vector<float>> by_phase[2];
  for (bool grouped : {true, false})
    for (int n : threads) {
      spec.grouped = grouped;
      Moe moe(spec, weights, k, n);
      for (int32_t T : tokens)
        for (int32_t decode : {0, T / 3, T}) {
          const Moe::Out out = moe.run(x, T, decode);
          for (int32_t t = 0; t < T; ++t) {
            const float* routes = out.routes.data() + (size_t)t * 2 * (size_t)shape.top_k;
            const bool prefill = t >= decode;
            auto& known = by_phase[prefill];
            if ((int32_t)known.size() <= t) known.resize((size_t)t + 1);
            std::vector<float>& want = known[(size_t)t];
            if (want.empty()) want = plain(spec, weights, k, x.data() + (size_t)t * (size_t)shape.hidden, routes, prefill);
            if (!check(same_row(out.y.data() + (size_t)t * (size_t)shape.hidden, want.data(), shape.hidden),
                       "%s %s [%d, %d] %d of %d, %s, %d threads, T %d, decode %d: row %d differs", k.isa, f.name, shape.hidden,
                       shape.inner, shape.top_k, shape.experts, grouped ? "grouped" : "plain", n, T, decode, t))
              return;
            check(std::isnan(want[0]) == (t == 0), "%s %s: row %d: %g", k.isa, f.name, t, want[0]);
          }
        }
    }
}

// Against the sum in double, with every kernel in scalar code. limit > 0: with biases, clamped. weighs: weights multiply
// inputs.
void matches_textbook(float limit, bool weighs = false) {
  MoeSpec spec{72, 40, 5, 3};
  spec.alpha = 1.7f;
  spec.limit = limit;
  spec.weighs = weighs;
  OwnContext packing(scalar::table, 3);
  MoeWeights weights(spec, random_matrices(packing.c));
  Moe moe(spec, weights, scalar::table, 3);
  Random random(4);
  const int32_t T = 90;
  const std::vector<float> x = normal((size_t)T * 72, 1, random);
  const Moe::Out out = moe.run(x, T, 10);
  auto value = [](const uint8_t* packed, int32_t rows, int32_t cols, size_t matrix, int32_t r, int32_t c) {
    return (double)scalar::weight({DSO_F32, rows, cols, packed + matrix * ::packed_bytes(DSO_F32, rows, cols)}, r, c);
  };
  for (int32_t t = 0; t < T; ++t) {
    const float* routes = out.routes.data() + (size_t)t * 6;
    std::vector<double> y(72, 0);
    for (int32_t j = 0; j < 3; ++j) {
      const size_t e = (size_t)routes[j];
      for (int32_t i = 0; i < 40; ++i) {
        double gate = limit > 0 ? weights.up_bias[2 * e * 40 + (size_t)i] : 0,
               up = limit > 0 ? weights.up_bias[(2 * e + 1) * 40 + (size_t)i] : 0;
        for (int32_t c = 0; c < 72; ++c) {
          const double input = (weighs ? routes[3 + j] : 1.0) * x[(size_t)(t * 72 + c)];
          gate += value(weights.gate_up->get(), 40, 72, 2 * e, i, c) * input;
          up += value(weights.gate_up->get(), 40, 72, 2 * e + 1, i, c) * input;
        }
        double h = gate / (1 + std::exp(-gate)) * up;
        if (limit > 0) {
          const double g = std::min(gate, (double)limit), u = std::clamp(up, -(double)limit, (double)limit);
          h = (u + 1) * g / (1 + std::exp(-(double)spec.alpha * g));
        }
        const double share = weighs ? 1 : routes[3 + j];
        for (int32_t r = 0; r < 72; ++r) y[(size_t)r] += share * value(weights.down->get(), 72, 40, e, r, i) * h;
      }
      for (int32_t r = 0; limit > 0 && r < 72; ++r) y[(size_t)r] += routes[3 + j] * weights.down_bias[e * 72 + (size_t)r];
    }
    for (int32_t r = 0; r < 72; ++r)
      if (!check(std::fabs(y[(size_t)r] - out.y[(size_t)(t * 72 + r)]) < 2e-5, "row %d [%d]: %g, not %g", t, r,
                 out.y[(size_t)(t * 72 + r)], y[(size_t)r]))
        return;
  }
}

// The groups of two processes, which have the experts below and from the middle on, are together those of one.
void own_groups(const ExpertGroups& all, std::vector<float>& routes, int64_t tokens, int64_t decode) {
  const int64_t experts = all.chosen.experts, top_k = all.chosen.top_k, middle = experts / 2;
  if (middle == 0) return;
  ExpertGroups parts[] = {{0, {middle, top_k, 0, experts}, all.grouped},
                          {0, {experts - middle, top_k, middle, experts}, all.grouped}};
  size_t next[] = {0, 0};
  for (ExpertGroups& part : parts) {
    part.reserve(tokens);
    part.build({(uint8_t*)routes.data(), 8 * top_k, tokens}, decode);
  }
  check(parts[0].pairs() + parts[1].pairs() == all.pairs(), "%ld and %ld of %ld pairs", (long)parts[0].pairs(),
        (long)parts[1].pairs(), (long)all.pairs());
  for (const ExpertGroup& g : all.groups()) {
    const int side = g.expert >= middle;
    const ExpertGroups& part = parts[side];
    if (!check(next[side] < part.groups().size(), "a group is missing")) return;
    const ExpertGroup& own = part.groups()[next[side]++];
    check(own.expert + side * middle == g.expert && own.end - own.begin == g.end - g.begin &&
              own.prefill - own.begin == g.prefill - g.begin,
          "expert %ld has another group", (long)g.expert);
    for (int64_t p = 0; p < g.end - g.begin; ++p)
      check(
          *part.tokens(own.begin + p) == *all.tokens(g.begin + p) && same(part.weight(own.begin + p), all.weight(g.begin + p)),
          "expert %ld, pair %ld is another", (long)g.expert, (long)p);
  }
}

void groups(int64_t tokens, int64_t experts, int64_t top_k, bool grouped, int64_t decode, Random& random) {
  std::vector<float> routes((size_t)(tokens * 2 * top_k));
  const float absurd[] = {NAN, -1, -INFINITY, INFINITY, (float)experts, 1e20f, -0.0f};
  for (float& v : routes) v = random.below(9) ? (float)random.below((int)experts) : absurd[random.below(7)];
  ExpertGroups g(0, {experts, top_k, 0, experts}, grouped);
  g.reserve(tokens);
  g.build({(uint8_t*)routes.data(), 8 * top_k, tokens}, decode);
  check(g.pairs() == tokens * top_k, "%ld pairs", (long)g.pairs());
  std::vector<int> times((size_t)tokens);
  int64_t at = 0, expert = -1;
  for (const ExpertGroup& group : g.groups()) {
    check(group.begin == at && group.begin < group.end && group.begin <= group.prefill && group.prefill <= group.end,
          "group %ld..%ld..%ld after %ld", (long)group.begin, (long)group.prefill, (long)group.end, (long)at);
    check(group.expert >= 0 && group.expert < experts && (!grouped || group.expert > expert), "expert %ld after %ld",
          (long)group.expert, (long)expert);
    expert = group.expert;
    for (; at < group.end; ++at) {
      const int64_t t = *g.tokens(at);
      if (!check(t >= 0 && t < tokens && (at < group.prefill) == (t < decode), "pair %ld is of token %ld", (long)at, (long)t))
        return;
      check(at == group.begin || t >= *g.tokens(at - 1), "tokens descend at pair %ld", (long)at);
      if (!grouped) check(t == at / top_k, "pair %ld is of token %ld", (long)at, (long)t);
      ++times[(size_t)t];
      bool found = false;  // the weight of this expert, or of an invalid index
      for (int64_t j = 0; j < top_k; ++j) {
        const float number = routes[(size_t)(t * 2 * top_k + j)];
        const int64_t meant = number >= 0 && number < (float)experts ? (int64_t)number : 0;
        found |= meant == group.expert && same(routes[(size_t)(t * 2 * top_k + top_k + j)], g.weight(at));
      }
      check(found, "pair %ld has another's weight", (long)at);
    }
  }
  check(at == tokens * top_k, "groups end at %ld", (long)at);
  for (int n : times) check(n == top_k, "a token has %d pairs", n);
  own_groups(g, routes, tokens, decode);
}

void blocks() {
  for (int64_t tiles : {1, 2, 5, 6, 7, 88, 128, 448})
    for (int64_t step : {1, 2, 3, 6})
      for (int64_t wanted : {0, 1, 2, 7, 10, 64, 1000}) {
        const TileBlocks b = TileBlocks::of(tiles, step, wanted);
        check(b.first(0) == 0 && b.first(b.blocks) == tiles, "%ld tiles in %ld blocks: ends", (long)tiles, (long)b.blocks);
        for (int64_t i = 0; i < b.blocks; ++i) {
          const int64_t n = b.first(i + 1) - b.first(i);
          check(n > 0 && n <= b.largest() && b.first(i) % step == 0,
                "%ld tiles in %ld blocks of step %ld: block %ld has %ld, at most %ld", (long)tiles, (long)b.blocks, (long)step,
                (long)i, (long)n, (long)b.largest());
        }
      }
}

}  // namespace

int main() {
  Random random(1);
  for (bool grouped : {true, false})
    for (int64_t tokens : {1, 2, 30, 200})
      for (int64_t experts : {1, 2, 7, 64})
        for (int64_t top_k = 1; top_k <= std::min<int64_t>(experts, 8); top_k += 3)
          for (int64_t decode : {int64_t(0), tokens / 3, tokens}) groups(tokens, experts, top_k, grouped, decode, random);
  blocks();
  matches_textbook(0);
  matches_textbook(0.9f);
  matches_textbook(0, true);
  const int32_t sigmoid = DSO_FLAG_SIGMOID | DSO_FLAG_NORMALIZE;
  for (const Variant& v : variants())
    for (const Formats& f : kFormats) {
      equals_plain(*v.kernels, f, {80, 56, 7, 3}, {1, 2, 5, 64, 91}, {1, 2, 5}, sigmoid);
      equals_plain(*v.kernels, f, {33, 17, 16, 6}, {1, 3, 70}, {2}, 0);
      equals_plain(*v.kernels, f, {72, 44, 5, 2}, {1, 6, 80}, {3}, 0, 0.9f);  // with biases, clamped
      equals_plain(*v.kernels, f, {420, 330, 2, 1}, {1, 7, 210}, {2}, sigmoid, 0.9f);
      equals_plain(*v.kernels, f, {72, 44, 5, 2}, {1, 6, 80}, {3}, DSO_FLAG_SIGMOID | DSO_FLAG_WEIGH_INPUT);
      equals_plain(*v.kernels, f, {145, 200, 1, 1}, {1, 63, 300}, {1, 3}, sigmoid);  // all rows to one expert, in blocks
      equals_plain(*v.kernels, f, {420, 330, 2, 1}, {1, 7, 210}, {2, 9}, sigmoid);   // more tiles than a block takes
    }
  for (const Formats& f : {kFormats[1], kFormats[3]})
    equals_plain(*variants().back().kernels, f, {1100, 70, 3, 2}, {1, 6, 300}, {64}, sigmoid);  // tokens cut, too
  return report("test_experts");
}
