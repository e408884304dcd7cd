// Bidirectional attention through the C interface: against plain double arithmetic, with the same bits on every ISA, for any
// number of threads and in any batch; values that are not finite stay in their sequence.
#include "plan_parts.hpp"

namespace {

struct Sizes {
  int32_t heads, kv_heads, head_dim, window;
  int32_t q() const { return heads * head_dim; }
  int32_t kv() const { return kv_heads * head_dim; }
  int32_t all() const { return q() + 2 * kv(); }
};

using Rows = std::vector<float>;

// One sequence of `rows` rows of q, k and v in double.
std::vector<double> plain(const Sizes& s, const float* x, int32_t rows) {
  std::vector<double> y((size_t)(rows * s.q()));
  for (int32_t h = 0; h < s.heads; ++h)
    for (int32_t i = 0; i < rows; ++i) {
      const int32_t kv = h / (s.heads / s.kv_heads) * s.head_dim, q = h * s.head_dim;
      std::vector<double> weight((size_t)rows);
      double top = -INFINITY, total = 0;
      auto seen = [&](int32_t j) { return s.window == 0 || std::abs(i - j) <= s.window; };
      for (int32_t j = 0; j < rows; ++j) {
        double score = 0;
        for (int32_t c = 0; c < s.head_dim; ++c) score += double(x[i * s.all() + q + c]) * x[j * s.all() + s.q() + kv + c];
        weight[(size_t)j] = 0.3 * score;
        if (seen(j)) top = std::max(top, weight[(size_t)j]);
      }
      for (int32_t j = 0; j < rows; ++j) total += weight[(size_t)j] = seen(j) ? std::exp(weight[(size_t)j] - top) : 0;
      for (int32_t j = 0; j < rows; ++j)
        for (int32_t c = 0; c < s.head_dim; ++c)
          y[(size_t)(i * s.q() + q + c)] += weight[(size_t)j] / total * x[j * s.all() + s.q() + s.kv() + kv + c];
    }
  return y;
}

class Encoder {  // a plan over given rows of q, k and v
 public:
  Encoder(const Sizes& s, const Kernels& kernels, int threads, int32_t kv_heads = 0) : s(s), context(kernels, threads) {
    auto f32 = [](int32_t width) { return dso_slot{DSO_SLOT_F32, width, 0, 0}; };
    const dso_slot slots[] = {f32(s.all()), f32(s.q()), f32(s.kv()), f32(s.kv()), f32(s.q())};
    std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0}),
                                   step_of(DSO_OP_COLUMNS, {0}, {1}),
                                   step_of(DSO_OP_COLUMNS, {0}, {2}),
                                   step_of(DSO_OP_COLUMNS, {0}, {3}),
                                   step_of(DSO_OP_ENCODER_ATTENTION, {1, 2, 3}, {4}),
                                   step_of(DSO_OP_HIDDEN_OUT, {4}, {})};
    for (int i = 1; i < 4; ++i) steps[i].groups = 1;
    steps[2].offset = s.q();
    steps[3].offset = s.q() + s.kv();
    dso_step& attention = steps[4];
    attention.heads = s.heads;
    attention.kv_heads = kv_heads ? kv_heads : s.kv_heads;
    attention.head_dim = s.head_dim;
    attention.window = s.window;
    attention.scale = 0.3f;
    steps[5].flags = DSO_FLAG_LAST;
    created = dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots, 5, nullptr, 0, 5, &plan);
  }
  ~Encoder() {
    if (plan) dso_plan_destroy(plan);
  }

  Rows run(const Rows& x, const std::vector<int32_t>& lengths, int32_t before = 0, int32_t expected = 0) {
    const auto count = (int32_t)lengths.size(), T = (int32_t)x.size() / s.all();
    const std::vector<int32_t> earlier((size_t)count, before), phase((size_t)count, DSO_PHASE_PREFILL);
    Rows last((size_t)(T * s.q()), NAN);
    dso_batch b{};
    b.T = T;
    b.S = count;
    b.query_len = lengths.data();
    b.context_len = earlier.data();
    b.phase = phase.data();
    b.states = x.data();
    b.last_hidden = last.data();
    check(dso_plan_run(plan, &b) == expected, "run: %s", dso_last_error());
    return last;
  }

  const Sizes s;
  OwnContext context;
  dso_plan* plan = nullptr;
  int32_t created = 0;
};

void on_every_isa(const Sizes& s) {
  Random random((uint64_t)s.all());
  const std::vector<int32_t> lengths = {1, 70, 17, 128, 31, 200};
  int32_t T = 0;
  for (int32_t n : lengths) T += n;
  const Rows x = normal((size_t)(T * s.all()), 1, random);
  Rows first;
  for (const Variant& v : variants())
    for (int threads : {1, 3}) {
      Encoder e(s, *v.kernels, threads);
      const Rows y = e.run(x, lengths);
      if (first.empty()) first = y;
      check(y == first, "%s, %d threads: other bits", v.name.c_str(), threads);
      int32_t at = 0;
      for (int32_t n : lengths) {
        const Rows own(x.begin() + at * s.all(), x.begin() + (at + n) * s.all());
        const Rows alone = e.run(own, {n});
        check(std::equal(alone.begin(), alone.end(), first.begin() + at * s.q()), "%s: %d rows alone have other bits",
              v.name.c_str(), n);
        if (threads == 1) {
          const std::vector<double> exact = plain(s, own.data(), n);
          double worst = 0;
          for (size_t i = 0; i < exact.size(); ++i) worst = std::max(worst, std::abs(alone[i] - exact[i]));
          check(worst <= 2e-5, "%s: off by %g in %d rows", v.name.c_str(), worst, n);
        }
        at += n;
      }
      Rows poisoned = x;
      for (int32_t i = 0; i < s.all(); ++i) poisoned[(size_t)((1 + 70) * s.all() + i)] = i % 2 ? NAN : INFINITY;
      const Rows z = e.run(poisoned, lengths);
      check(std::equal(z.begin(), z.begin() + (1 + 70) * s.q(), first.begin()) &&
                std::equal(z.begin() + (1 + 70 + 17) * s.q(), z.end(), first.begin() + (1 + 70 + 17) * s.q()),
            "%s: a NaN reached another sequence", v.name.c_str());
      e.run(x, lengths, 1, DSO_EINVAL);
      check(strstr(dso_last_error(), "context_len[0] is 1, must be 0"), "got: %s", dso_last_error());
    }
}

void refused() {
  const Kernels& kernels = *variants()[0].kernels;
  for (const Sizes& s : {Sizes{3, 2, 8, 0}, Sizes{2, 2, 8, -1}, Sizes{2, 2, 7, 0}, Sizes{1, 1, 258, 0}}) {
    Encoder e(s, kernels, 1);
    check(e.created == DSO_EINVAL && strstr(dso_last_error(), "ENCODER_ATTENTION"), "got: %s", dso_last_error());
  }
  Encoder e({4, 4, 8, 0}, kernels, 1, 2);
  check(e.created == DSO_EINVAL && strstr(dso_last_error(), "in[1]"), "got: %s", dso_last_error());
}

}  // namespace

int main() {
  for (const Sizes& s : {Sizes{3, 3, 12, 0}, Sizes{4, 2, 64, 0}, Sizes{2, 1, 34, 5}, Sizes{1, 1, 128, 64}}) on_every_isa(s);
  refused();
  return report("test_encoder");
}
