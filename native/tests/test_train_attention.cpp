// Attention for training on every variant against softmax in double with a bound for each element; the same bits whatever the
// threads and other sequences; nothing written between the sequences; overflow, NaN, and the errors of the C interface.
#include "plan_parts.hpp"
#include "train_attention_fixture.hpp"

static Results run(const Variant& v, int threads, Inputs& in, const Sequences& of, int layout = 0) {
  OwnContext context(*v.kernels, threads);
  Results out(in.shape, layout);
  const dso_train_attention a = call_of(in, out, of);
  check(dso_train_attention_forward(context.c, &a) == DSO_OK, "%s: %s", v.name.c_str(), dso_last_error());
  check(dso_train_attention_backward(context.c, &a) == DSO_OK, "%s: %s", v.name.c_str(), dso_last_error());
  return out;
}

// The expected value, and the magnitude that errors are relative to.
struct Expected {
  std::vector<double> value, size;
  explicit Expected(size_t n) : value(n), size(n) {}
  void add(size_t i, double x, double of) { value[i] += x, size[i] += of; }
};

struct Reference {
  Expected o, q_grad, k_grad, v_grad;
  double largest_logit = 0;  // sum of |q k|, which bounds the error of a logit
  double rounding;           // of a stored element

  Reference(const Inputs& in, const Sequences& of)
      : o(count(in, in.o_grad)),
        q_grad(count(in, in.q)),
        k_grad(count(in, in.k)),
        v_grad(count(in, in.v)),
        rounding(in.shape.type == DSO_TYPE_BF16 ? 1.0 / 256 : 6e-8) {
    for (size_t i = 0; i < of.begin.size(); ++i)
      for (int64_t t = of.begin[i]; t < of.end[i]; ++t)
        for (int64_t h = 0; h < in.shape.heads; ++h) row(in, of.begin[i], t, h);
  }
  static size_t count(const Inputs& in, const Tensor& t) { return (size_t)(in.shape.tokens() * t.heads * t.width); }

  void row(const Inputs& in, int64_t begin, int64_t t, int64_t h) {
    const Shape& s = in.shape;
    const int64_t g = h / (s.heads / s.kv_heads), first = s.window ? std::max(begin, t - s.window + 1) : begin;
    std::vector<double> p, out((size_t)s.v_width), size((size_t)s.v_width);
    double top = -1e300, total = 0;
    for (int64_t j = first; j <= t; ++j) {
      double x = 0, of = 0;
      for (int64_t c = 0; c < s.qk_width; ++c)
        x += (double)in.q.at(t, h, c) * in.k.at(j, g, c), of += std::abs((double)in.q.at(t, h, c) * in.k.at(j, g, c));
      p.push_back(x * (double)s.scale());
      top = std::max(top, p.back()), largest_logit = std::max(largest_logit, of * (double)s.scale());
    }
    for (double& x : p) total += x = std::exp(x - top);
    double delta = 0, delta_size = 0;
    for (int64_t j = first; j <= t; ++j)
      for (int64_t c = 0; c < s.v_width; ++c) {
        const double x = p[(size_t)(j - first)] / total * in.v.at(j, g, c);
        out[(size_t)c] += x, size[(size_t)c] += std::abs(x);
      }
    for (int64_t c = 0; c < s.v_width; ++c) {
      o.add(at(in.o_grad, t, h, c), out[(size_t)c], size[(size_t)c]);
      delta += out[(size_t)c] * in.o_grad.at(t, h, c), delta_size += size[(size_t)c] * std::abs(in.o_grad.at(t, h, c));
    }
    for (int64_t j = first; j <= t; ++j) {
      const double weight = p[(size_t)(j - first)] / total;
      double dp = 0, dp_size = 0;
      for (int64_t c = 0; c < s.v_width; ++c) {
        const double x = (double)in.v.at(j, g, c) * in.o_grad.at(t, h, c);
        dp += x, dp_size += std::abs(x);
        v_grad.add(at(in.v, j, g, c), weight * in.o_grad.at(t, h, c), weight * std::abs(in.o_grad.at(t, h, c)));
      }
      const double ds = weight * (dp - delta) * (double)s.scale(),
                   ds_size = weight * (dp_size + delta_size) * (double)s.scale();
      for (int64_t c = 0; c < s.qk_width; ++c) {
        q_grad.add(at(in.q, t, h, c), ds * in.k.at(j, g, c), ds_size * std::abs(in.k.at(j, g, c)));
        k_grad.add(at(in.k, j, g, c), ds * in.q.at(t, h, c), ds_size * std::abs(in.q.at(t, h, c)));
      }
    }
  }
  static size_t at(const Tensor& like, int64_t t, int64_t h, int64_t c) {
    return (size_t)((t * like.heads + h) * like.width + c);
  }

  // Weights err by their logits' error and, in bf16, once more by rounding; their products' sums in fp32 by a few roundings.
  double bound() const { return rounding + 6e-8 * (8 + 2 * largest_logit); }
  void compare(const char* what, const Expected& e, const Tensor& got, const Sequences& of, const std::string& where) const {
    double worst = 0;
    for (size_t i = 0; i < of.begin.size(); ++i)
      for (int64_t t = of.begin[i]; t < of.end[i]; ++t)
        for (int64_t h = 0; h < got.heads; ++h)
          for (int64_t c = 0; c < got.width; ++c) {
            const size_t n = at(got, t, h, c);
            const double error = std::abs((double)got.at(t, h, c) - e.value[n]),
                         allowed = bound() * e.size[n] + rounding * std::abs(e.value[n]);
            worst = std::max(worst, std::isfinite(error) ? error / (allowed + 1e-30) : 1e9);
          }
    check(worst <= 1, "%s: %s errs by %.2f of its bound", where.c_str(), what, worst);
  }
  void compare(const Results& r, const Sequences& of, const std::string& where) const {
    compare("o", o, r.o, of, where), compare("q_grad", q_grad, r.q_grad, of, where);
    compare("k_grad", k_grad, r.k_grad, of, where), compare("v_grad", v_grad, r.v_grad, of, where);
  }
};

static std::string name_of(const Variant& v, const Shape& s) {
  char text[200];
  snprintf(text, sizeof text, "%s, %s, %d x %d tokens, %d/%d heads of %d/%d, window %lld", v.name.c_str(),
           s.type == DSO_TYPE_BF16 ? "bf16" : "fp32", s.rows, s.row_tokens, s.heads, s.kv_heads, s.qk_width, s.v_width,
           (long long)s.window);
  return text;
}

static Sequences drawn(const Shape& s, Random& random) {  // with gaps, and some empty
  Sequences of;
  for (int64_t row = 0; row < s.rows; ++row)
    for (int64_t t = random.below(3) ? 0 : random.below(s.row_tokens); t < s.row_tokens;) {
      const int64_t end =
          std::min<int64_t>(s.row_tokens, t + (random.below(3) ? random.below(40) : random.below(2 * s.row_tokens)));
      of.add(row * s.row_tokens + t, row * s.row_tokens + end);
      t = end + (random.below(3) ? 0 : random.below(9)) + (end == t);
    }
  return of;
}

static void shapes(const Variant& v) {
  Random random(11);
  const int widths[][2] = {{2, 2}, {64, 64}, {48, 32}, {192, 128}, {10, 34}, {32, 256}};
  for (const int length : {1, 2, 17, 63, 64, 65, 131})
    for (const int type : {DSO_TYPE_F32, DSO_TYPE_BF16}) {
      const auto& w = widths[random.below(v.name == "amx-emulated" ? 3 : 6)];
      const int kv_heads = 1 + random.below(2), group = 1 + random.below(length > 64 ? 3 : 8);
      Shape s = {type, 1 + random.below(2), length, kv_heads * group, kv_heads, w[0], w[1]};
      if (random.below(2)) s.window = 1 + random.below(length + 20);
      const int layout = random.below(4);
      Inputs in(s, layout, random);
      Sequences of = drawn(s, random);
      if (length < 3) of = {{0}, {length}};
      Reference(in, of).compare(run(v, 2, in, of, layout), of, name_of(v, s));
    }
}

// Sequences that are cut into pieces of keys, and queries into ranges.
static void long_sequences(const Variant& v) {
  Random random(12);
  for (const int64_t window : {0, 300}) {
    const Shape s = {window ? DSO_TYPE_BF16 : DSO_TYPE_F32, 1, 2181, 2, 1, 8, 6, window};
    Inputs in(s, 0, random);
    const Sequences of = {{0, 40}, {40, 2181}};
    const Results one = run(v, 1, in, of);
    Reference(in, of).compare(one, of, name_of(v, s));
    for (const int threads : {2, 3})
      check(one.same(run(v, threads, in, of)), "%s: %d threads give other bits", name_of(v, s).c_str(), threads);
  }
}

// A sequence's bits depend only on itself; memory between the sequences is unchanged.
static void alone(const Variant& v) {
  Random random(13);
  for (const int type : {DSO_TYPE_F32, DSO_TYPE_BF16}) {
    const Shape s = {type, 2, 150, 4, 2, 64, 32};
    Inputs in(s, 1, random);
    const Sequences all = {{0, 70, 160, 299}, {70, 140, 290, 300}}, some = {{70, 160}, {140, 290}},
                    others = {{0, 299}, {70, 300}};
    const Results together = run(v, 3, in, all, 1), untouched(s, 1);
    Results apart(s, 1);
    OwnContext context(*v.kernels, 1);
    for (const Sequences& of : {some, others}) {
      const dso_train_attention a = call_of(in, apart, of);
      check(dso_train_attention_forward(context.c, &a) == 0 && dso_train_attention_backward(context.c, &a) == 0, "%s",
            dso_last_error());
      if (&of == &some) check(!apart.same(together), "all sequences are the same as some");
    }
    check(apart.same(together), "%s: sequences alone have other bits", name_of(v, s).c_str());
    for (int64_t t = 140; t < 160; ++t)
      for (int64_t c = 0; c < 32; ++c)
        check(to_bits(together.o.at(t, 3, c)) == to_bits(untouched.o.at(t, 3, c)), "token %lld was written", (long long)t);
  }
}

// Logits of thousands: one key gets all weight, and sums neither overflow nor vanish.
static void overflow(const Variant& v) {
  Random random(14);
  for (const float magnitude : {300.0f, 3e4f, 1e17f})
    for (const int type : {DSO_TYPE_F32, DSO_TYPE_BF16}) {
      Shape s = {type, 1, 130, 3, 1, 64, 64};
      s.magnitude = magnitude;
      Inputs in(s, 0, random);
      const Sequences of = {{0}, {130}};
      const Results r = run(v, 2, in, of);
      if (magnitude < 1e3f) Reference(in, of).compare(r, of, name_of(v, s) + ", large logits");
      for (int64_t t = 0; t < 130; ++t)
        for (int64_t c = 0; c < 64; ++c)
          check(std::isfinite(r.o.at(t, 1, c)) && std::abs(r.o.at(t, 1, c)) < 10 && std::isfinite(r.v_grad.at(t, 0, c)),
                "%s: a logit of %g overflows", v.name.c_str(), (double)magnitude);
    }
}

// A NaN reaches every row that sees its token, and no other sequence.
static void nan(const Variant& v) {
  Random random(15);
  for (const int type : {DSO_TYPE_F32, DSO_TYPE_BF16})
    for (const bool in_value : {false, true}) {
      const Shape s = {type, 1, 200, 2, 1, 32, 32};
      Inputs in(s, 0, random);
      const Sequences of = {{0, 100}, {100, 200}};
      const Results clean = run(v, 2, in, of);
      (in_value ? in.v : in.k).put(130, 0, 5, NAN);
      const Results r = run(v, 2, in, of);
      for (int64_t t = 130; t < 200; ++t) {
        check(std::isnan(r.o.at(t, 1, 5)), "%s: row %lld hides a NaN of token 130", v.name.c_str(), (long long)t);
        check(std::isnan(r.q_grad.at(t, 1, 7)), "%s: the gradient of row %lld hides a NaN", v.name.c_str(), (long long)t);
      }
      for (int64_t t = 0; t < 100; ++t)
        check(to_bits(r.o.at(t, 0, 5)) == to_bits(clean.o.at(t, 0, 5)) &&
                  to_bits(r.k_grad.at(t, 0, 5)) == to_bits(clean.k_grad.at(t, 0, 5)),
              "another sequence sees a NaN");
    }
}

static void refused(const Variant& v) {
  Random random(16);
  const Shape s = {DSO_TYPE_F32, 2, 10, 2, 1, 8, 8};
  Inputs in(s, 0, random);
  Results out(s, 0);
  OwnContext context(*v.kernels, 1);
  const auto expect = [&](const char* says, auto change, const Sequences& of = {{0, 10}, {10, 20}}) {
    dso_train_attention a = call_of(in, out, of);
    change(a);
    const int32_t code = dso_train_attention_backward(context.c, &a);
    check(code == DSO_EINVAL && strstr(dso_last_error(), says), "expected \"%s\", got %d \"%s\"", says, code, dso_last_error());
  };
  expect("type 9", [](auto& a) { a.type = 9; });
  expect("2 heads cannot share 3 kv heads", [](auto& a) { a.kv_heads = 3; });
  expect("qk_width is 7", [](auto& a) { a.qk_width = 7; });
  expect("v_width is 258", [](auto& a) { a.v_width = 258; });
  expect("window is -1", [](auto& a) { a.window = -1; });
  expect("o_grad.data is NULL", [](auto& a) { a.o_grad.data = nullptr; });
  expect("state is NULL", [](auto& a) { a.state = nullptr; });
  expect("crosses the end of a row of 10", [](auto&) {}, {{0}, {11}});
  expect("sequence 1 has tokens 3 to 8, must lie within 5 to 20", [](auto&) {}, {{0, 3}, {5, 8}});
  expect("sequence 0 has tokens 15 to 21", [](auto&) {}, {{15}, {21}});
  dso_train_attention none = call_of(in, out, {});
  none.q.data = nullptr;
  check(dso_train_attention_backward(context.c, &none) == DSO_OK, "no sequences: %s", dso_last_error());
  check(dso_train_attention_forward(context.c, nullptr) == DSO_EINVAL, "NULL is taken");
}

int main() {
  for (const Variant& v : variants()) {
    if (v.name.ends_with("-vnni") || v.name.ends_with("-dotprod")) continue;  // the same code as their neighbors
    shapes(v);
    if (v.name != "amx-emulated") long_sequences(v);  // minutes under AddressSanitizer; how they are cut is the runtime's
    alone(v);
    overflow(v);
    nan(v);
    refused(v);
  }
  return report("test_train_attention");
}
