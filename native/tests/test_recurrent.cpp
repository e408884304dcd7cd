// Steps with a recurrent state through the C interface: against plain double arithmetic, and with the same bits on every ISA,
// for any number of threads, at any cut, and from states that were stored on the way.
#include "plan_parts.hpp"
#include "states.hpp"

namespace {

struct Sizes {
  int32_t k_heads, heads, k_dim, v_dim, taps;
  int32_t qkv() const { return 2 * k_heads * k_dim + heads * v_dim; }
  int32_t out() const { return heads * v_dim; }
  int32_t hidden() const { return qkv() + 2 * heads; }
};

struct Weights {
  std::vector<float> taps, bias, a_log, dt_bias;
  Weights(const Sizes& s, Random& random)
      : taps(normal((size_t)(s.taps * s.qkv()), 0.5f, random)),
        bias(normal((size_t)s.qkv(), 0.2f, random)),
        a_log(normal((size_t)s.heads, 1, random)),
        dt_bias(normal((size_t)s.heads, 1, random)) {
    for (float& v : a_log) v -= 3;
  }
};

using Rows = std::vector<float>;  // [rows, width]

// One sequence in double: silu(conv(qkv)), then the delta rule token by token.
std::vector<double> plain(const Sizes& s, const Weights& w, const Rows& x, int32_t rows) {
  const int32_t n = s.qkv();
  std::vector<double> state((size_t)(s.heads * s.k_dim * s.v_dim)), y((size_t)(rows * s.out())), mixed((size_t)n);
  for (int32_t t = 0; t < rows; ++t) {
    for (int32_t c = 0; c < n; ++c) {
      double sum = w.bias[(size_t)c];
      for (int32_t j = 0; j < s.taps; ++j)
        if (const int32_t row = t - s.taps + 1 + j; row >= 0)
          sum += double(w.taps[(size_t)(j * n + c)]) * x[(size_t)(row * s.hidden() + c)];
      mixed[(size_t)c] = sum / (1 + std::exp(-sum));
    }
    for (int32_t h = 0; h < s.heads; ++h) {
      const double *q = &mixed[(size_t)(h / (s.heads / s.k_heads) * s.k_dim)], *k = q + s.k_heads * s.k_dim,
                   *v = &mixed[(size_t)(2 * s.k_heads * s.k_dim + h * s.v_dim)];
      double qq = 1e-6, kk = 1e-6;
      for (int32_t i = 0; i < s.k_dim; ++i) qq += q[i] * q[i], kk += k[i] * k[i];
      const float *a = &x[(size_t)(t * s.hidden() + n)], *b = a + s.heads;
      const double decay =
          std::exp(-std::exp(double(w.a_log[(size_t)h])) * std::log1p(std::exp(double(a[h]) + w.dt_bias[(size_t)h])));
      const double rate = 1 / (1 + std::exp(-double(b[h])));
      for (int32_t c = 0; c < s.v_dim; ++c) {
        double predicted = 0, out = 0;
        auto at = [&](int32_t i) -> double& { return state[(size_t)((h * s.k_dim + i) * s.v_dim + c)]; };
        for (int32_t i = 0; i < s.k_dim; ++i) predicted += (at(i) *= decay) * k[i] / std::sqrt(kk);
        for (int32_t i = 0; i < s.k_dim; ++i) {
          at(i) += k[i] / std::sqrt(kk) * rate * (v[c] - predicted);
          out += at(i) * q[i] / std::sqrt(qq * s.k_dim);
        }
        y[(size_t)(t * s.out() + h * s.v_dim + c)] = out;
      }
    }
  }
  return y;
}

class Recurrent {  // a plan over given rows whose last hidden state is delta_rule(conv(x)), padded with columns of x
 public:
  Recurrent(const Sizes& s, const Weights& w, const Kernels& kernels, int threads) : s(s), context(kernels, threads) {
    const int32_t n = s.qkv(), hidden = s.hidden(), rest = hidden - s.out();
    const dso_weight weights[] = {vector(w.taps), vector(w.bias), vector(w.a_log), vector(w.dt_bias)};
    auto f32 = [](int32_t width) { return dso_slot{DSO_SLOT_F32, width, 0, 0}; };
    const dso_slot slots[] = {f32(hidden), f32(n), f32(s.heads), f32(s.heads), f32(n), f32(s.out()), f32(rest), f32(hidden)};
    std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0}),
                                   step_of(DSO_OP_COLUMNS, {0}, {1}),
                                   step_of(DSO_OP_COLUMNS, {0}, {2}),
                                   step_of(DSO_OP_COLUMNS, {0}, {3}),
                                   step_of(DSO_OP_SHORT_CONV, {1}, {4}, {0}, {1}),
                                   step_of(DSO_OP_DELTA_RULE, {4, 2, 3}, {5}, {2, 3}),
                                   step_of(DSO_OP_COLUMNS, {0}, {6}),
                                   step_of(DSO_OP_CONCAT, {5, 6}, {7}),
                                   step_of(DSO_OP_HIDDEN_OUT, {7}, {})};
    for (int i : {1, 2, 3, 6}) steps[(size_t)i].groups = 1;
    steps[2].offset = n;
    steps[3].offset = n + s.heads;
    steps[4].window = s.taps;
    steps[4].flags = DSO_FLAG_SILU;
    dso_step& rule = steps[5];
    rule.state = 1;
    rule.heads = s.heads;
    rule.kv_heads = s.k_heads;
    rule.head_dim = s.k_dim;
    rule.v_dim = s.v_dim;
    steps[8].flags = DSO_FLAG_LAST;
    check(dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots, 8, weights, 4, 5, &plan) == 0, "plan: %s",
          dso_last_error());
    const dso_state_shape shapes[] = {{1, s.taps - 1, n}, {s.heads, s.k_dim, s.v_dim}};
    check(dso_states_create(shapes, 2, 8, &states) == 0, "states: %s", dso_last_error());
  }
  ~Recurrent() {
    dso_plan_destroy(plan);
    dso_states_destroy(states);
  }

  struct Part {
    const Rows* x;
    int32_t begin, rows, from;
    std::vector<std::pair<int32_t, int32_t>> to;  // row of the part, slot
  };
  // The outputs of all rows, one part after the other.
  Rows run(const std::vector<Part>& parts, int32_t phase, int32_t expected = 0) {
    std::vector<int32_t> query, context_len, phases, from, to;
    Rows x;
    int32_t T = 0;
    for (const Part& p : parts) {
      query.push_back(p.rows);
      context_len.push_back(p.begin);
      phases.push_back(phase);
      from.push_back(p.from);
      for (auto [row, slot] : p.to) to.insert(to.end(), {T + row, slot});
      x.insert(x.end(), p.x->begin() + (long)p.begin * s.hidden(), p.x->begin() + (long)(p.begin + p.rows) * s.hidden());
      T += p.rows;
    }
    Rows last((size_t)(T * s.hidden()), NAN), out;
    dso_batch b{};
    b.T = T;
    b.S = (int32_t)parts.size();
    b.query_len = query.data();
    b.context_len = context_len.data();
    b.phase = phases.data();
    b.states = x.data();
    b.last_hidden = last.data();
    b.recurrent = states;
    b.state_from = from.data();
    b.state_to = to.data();
    b.n_state_to = (int32_t)to.size() / 2;
    check(dso_plan_run(plan, &b) == expected, "run: %s", dso_last_error());
    for (int32_t t = 0; t < T; ++t)
      out.insert(out.end(), &last[(size_t)(t * s.hidden())], &last[(size_t)(t * s.hidden())] + s.out());
    return out;
  }

  const Sizes s;
  OwnContext context;
  dso_plan* plan = nullptr;
  dso_states* states = nullptr;

 private:
  static dso_weight vector(const std::vector<float>& v) {
    return {DSO_VECTOR, 1, (int32_t)v.size(), 0, v.data(), 4 * (int64_t)v.size()};
  }
};

void on_every_isa(const Sizes& s) {
  Random random((uint64_t)s.qkv());
  const Weights w(s, random);
  const int32_t n = 50, m = 7;
  const Rows x = normal((size_t)(n * s.hidden()), 1, random), other = normal((size_t)(m * s.hidden()), 1, random);
  const std::vector<double> exact = plain(s, w, x, n);
  Rows first;
  for (const Variant& v : variants())
    for (int threads : {1, 3}) {
      Recurrent r(s, w, *v.kernels, threads);
      const Rows whole = r.run({{&x, 0, n, -1, {{n - 1, 0}}}}, DSO_PHASE_PREFILL);
      double worst = 0, largest = 0;
      for (size_t i = 0; i < exact.size(); ++i) {
        worst = std::max(worst, std::abs(whole[i] - exact[i]));
        largest = std::max(largest, std::abs(exact[i]));
      }
      check(worst <= 1e-5 * largest, "%s: off by %g of %g", v.name.c_str(), worst, largest);
      if (first.empty()) first = whole;
      check(whole == first, "%s, %d threads: other bits", v.name.c_str(), threads);
      // In three steps beside another sequence, with states stored on the way; then again from one of these.
      const Rows begin =
          r.run({{&x, 0, 20, -1, {{4, 1}, {11, 2}, {19, 3}}}, {&other, 0, m, -1, {{m - 1, 4}}}}, DSO_PHASE_PREFILL);
      const Rows middle = r.run({{&x, 20, 1, 3, {{0, 3}}}}, DSO_PHASE_DECODE);
      const Rows end = r.run({{&x, 21, n - 21, 3, {{n - 22, 3}}}}, DSO_PHASE_PREFILL);
      const Rows again = r.run({{&x, 12, n - 12, 2, {{n - 13, 5}}}}, DSO_PHASE_DECODE);
      auto same = [&](const Rows& got, int32_t rows, int32_t at, const char* what) {
        check(std::equal(got.begin(), got.begin() + (long)rows * s.out(), first.begin() + (long)at * s.out()), "%s: %s",
              v.name.c_str(), what);
      };
      same(begin, 20, 0, "the first step differs");
      same(middle, 1, 20, "the second step differs");
      same(end, n - 21, 21, "the third step differs");
      same(again, n - 12, 12, "the rows after a stored state differ");
      const size_t bytes = (size_t)r.states->slot_bytes;
      Buffer saved(bytes), copied(bytes);
      check(dso_states_save(r.states, 3, saved.get()) == 0 && dso_states_load(r.states, 6, saved.get()) == 0 &&
                dso_states_copy(r.states, 6, 7) == 0 && dso_states_save(r.states, 7, copied.get()) == 0 &&
                memcmp(saved.get(), copied.get(), bytes) == 0,
            "a saved slot is another: %s", dso_last_error());
      r.run({{&x, 20, 1, 3, {{0, 9}}}}, DSO_PHASE_DECODE, DSO_EINVAL);
      r.run({{&x, 20, 2, 3, {{0, 3}, {1, 1}}}}, DSO_PHASE_DECODE, DSO_EINVAL);
      r.run({{&x, 20, 1, 3, {{0, 3}}}, {&x, 20, 1, 3, {{0, 1}}}}, DSO_PHASE_DECODE, DSO_EINVAL);
    }
}

void refused() {
  dso_states* states = nullptr;
  const dso_state_shape bad[] = {{1, 0, 4}}, good[] = {{1, 3, 4}};
  check(dso_states_slot_bytes(bad, 1) == -1 && dso_states_slot_bytes(good, 1) == 4 * 3 * 16, "bytes of a slot");
  check(dso_states_create(good, 1, 0, &states) == DSO_EINVAL && strstr(dso_last_error(), "0 slots"), "got: %s",
        dso_last_error());
  check(dso_states_create(good, 1, 2, &states) == 0, "states: %s", dso_last_error());
  check(dso_states_copy(states, 0, 2) == DSO_EINVAL && strstr(dso_last_error(), "slot 2 does not exist"), "got: %s",
        dso_last_error());
  check(dso_states_release(states, 3) == DSO_EINVAL && dso_states_release(states, 0) == 0, "got: %s", dso_last_error());
  dso_states_destroy(states);
}

}  // namespace

int main() {
  for (const Sizes& s : {Sizes{2, 6, 20, 18, 4}, Sizes{1, 1, 128, 64, 2}, Sizes{3, 3, 7, 33, 3}}) on_every_isa(s);
  refused();
  return report("test_recurrent");
}
