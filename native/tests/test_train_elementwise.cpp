// Row-wise ops, the loss and the optimizer of training on every variant: close to results in double over odd sizes, types and
// strides; bitwise equal on every ISA and for any number of threads; nothing written outside, nothing read past a row.
#include <algorithm>
#include <functional>

#include "check.hpp"
#include "dso_train.h"

namespace {

struct Context {
  dso_context* c = nullptr;
  Context(const std::string& isa, int threads) {
    check(dso_context_create(isa.c_str(), threads, &c) == DSO_OK, "%s", dso_last_error());
  }
  ~Context() { dso_context_destroy(c); }
};

// rows x n elements between guards, with `gap` elements between rows that must not be read (NaN) or written.
struct Numbers {
  int64_t rows, n, gap;
  int type;
  Buffer bytes;

  Numbers(int64_t rows, int64_t n, int type, int64_t gap = 0)
      : rows(rows), n(n), gap(gap), type(type), bytes((size_t)std::max<int64_t>(0, rows * (n + gap) - gap) * size(), 0xff) {}
  Numbers(const Numbers& other) : Numbers(other.rows, other.n, other.type, other.gap) {
    memcpy(bytes.get(), const_cast<Numbers&>(other).bytes.get(), bytes.size());
  }

  size_t size() const { return type == DSO_TYPE_BF16 ? 2 : 4; }
  size_t at(int64_t r, int64_t c) const { return (size_t)(r * (n + gap) + c) * size(); }
  double get(int64_t r, int64_t c) {
    uint32_t bits = 0;
    memcpy((uint8_t*)&bits + 4 - size(), &bytes[at(r, c)], size());
    return from_bits(bits);
  }
  void set(int64_t r, int64_t c, float x) {
    const uint32_t bits = to_bits(type == DSO_TYPE_BF16 ? rounded_bf16(x) : x);
    memcpy(&bytes[at(r, c)], (const uint8_t*)&bits + 4 - size(), size());
  }
  Numbers& fill(Random& random, float scale = 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) set(r, c, scale * random.normal());
    return *this;
  }
  void check_gaps(const char* what) {
    for (int64_t r = 0; gap && r + 1 < rows; ++r)
      for (size_t i = at(r, n); i < at(r + 1, 0); ++i)
        if (!check(bytes[i] == 0xff, "%s: byte %zu between rows was written", what, i)) return;
  }
  dso_train_matrix matrix() { return {bytes.get(), n + gap, 0, type, 0}; }
  std::vector<uint8_t> all() { return {bytes.get(), bytes.get() + bytes.size()}; }
};

// Relative to the largest element of its row: one rounding to bf16, or a few of fp32.
double bound(int type) { return type == DSO_TYPE_BF16 ? 0x1p-8 : 2e-6; }

void near(Numbers& found, const std::function<double(int64_t, int64_t)>& exact, const char* what) {
  for (int64_t r = 0; r < found.rows; ++r) {
    double top = 1e-3;
    for (int64_t c = 0; c < found.n; ++c) top = std::max(top, std::fabs(exact(r, c)));
    for (int64_t c = 0; c < found.n; ++c)
      if (!check(std::fabs(found.get(r, c) - exact(r, c)) <= bound(found.type) * top,
                 "%s of %lld x %lld, type %d, at %lld, %lld: %g, not %g", what, (long long)found.rows, (long long)found.n,
                 found.type, (long long)r, (long long)c, found.get(r, c), exact(r, c)))
        return;
  }
  found.check_gaps(what);
}

using Bytes = std::vector<uint8_t>;
void append(Bytes& all, const Bytes& more) { all.insert(all.end(), more.begin(), more.end()); }
template <class T>
Bytes bytes_of(const std::vector<T>& x) {
  return {(const uint8_t*)x.data(), (const uint8_t*)(x.data() + x.size())};
}
void ok(int32_t code) { check(code == DSO_OK, "%s", dso_last_error()); }

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Bytes norms(dso_context* c, int64_t rows, int64_t n, int type, int64_t gap, Random random) {
  Numbers x(rows, n, type, gap), weight(1, n, type), dy(rows, n, type, gap);
  for (Numbers* m : {&x, &weight, &dy}) m->fill(random);
  Numbers y(rows, n, type), dx(rows, n, type, gap);
  std::vector<float> rstd((size_t)rows), dw((size_t)n, -7);
  const auto mx = x.matrix(), my = y.matrix(), mdy = dy.matrix(), mdx = dx.matrix();
  ok(dso_train_rms_norm(c, rows, n, &mx, weight.bytes.get(), 1e-5f, &my, rstd.data()));
  std::vector<double> scale((size_t)rows), pull((size_t)rows);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0, along = 0;
    for (int64_t i = 0; i < n; ++i)
      squares += x.get(r, i) * x.get(r, i), along += dy.get(r, i) * weight.get(0, i) * x.get(r, i);
    scale[(size_t)r] = 1 / std::sqrt(squares / (double)n + 1e-5);
    pull[(size_t)r] = along / (double)n * scale[(size_t)r] * scale[(size_t)r];
    check(std::fabs(rstd[(size_t)r] / scale[(size_t)r] - 1) < 1e-6, "rstd is %g, not %g", (double)rstd[(size_t)r],
          scale[(size_t)r]);
  }
  near(y, [&](int64_t r, int64_t i) { return x.get(r, i) * scale[(size_t)r] * weight.get(0, i); }, "rms_norm");
  ok(dso_train_rms_norm_backward(c, rows, n, &mdy, &mx, weight.bytes.get(), rstd.data(), &mdx, dw.data()));
  near(
      dx,
      [&](int64_t r, int64_t i) {
        return scale[(size_t)r] * (dy.get(r, i) * weight.get(0, i) - x.get(r, i) * pull[(size_t)r]);
      },
      "dx");
  for (int64_t i = 0; i < n; ++i) {
    double exact = 0, size = 1e-3;
    for (int64_t r = 0; r < rows; ++r)
      exact += dy.get(r, i) * x.get(r, i) * scale[(size_t)r], size += std::fabs(dy.get(r, i) * x.get(r, i) * scale[(size_t)r]);
    check(std::fabs(dw[(size_t)i] - exact) < 1e-6 * size, "dw[%lld] is %g, not %g", (long long)i, (double)dw[(size_t)i], exact);
  }
  Numbers in_place(dy);
  const auto mi = in_place.matrix();
  ok(dso_train_rms_norm_backward(c, rows, n, &mi, &mx, weight.bytes.get(), rstd.data(), &mi, nullptr));
  check(in_place.all() == dx.all(), "rms_norm_backward in place differs");
  Bytes all = y.all();
  append(all, dx.all());
  append(all, bytes_of(dw));
  return all;
}

Bytes gates(dso_context* c, int64_t rows, int64_t n, int type, int64_t gap, Random random) {
  Numbers gate(rows, n, type, gap), up(rows, n, type), dh(rows, n, type, gap);
  for (Numbers* m : {&gate, &up, &dh}) m->fill(random, 3);
  Numbers h(rows, n, type, gap), dgate(rows, n, type), dup(rows, n, type, gap), again(rows, n, type, gap);
  const auto mg = gate.matrix(), mu = up.matrix(), md = dh.matrix(), mh = h.matrix(), mdg = dgate.matrix(), mdu = dup.matrix(),
             ma = again.matrix();
  ok(dso_train_swiglu(c, rows, n, &mg, &mu, &mh));
  ok(dso_train_swiglu_backward(c, rows, n, &mg, &mu, &md, &mdg, &mdu, &ma));
  near(h, [&](int64_t r, int64_t i) { return gate.get(r, i) * sigmoid(gate.get(r, i)) * up.get(r, i); }, "swiglu");
  near(dup, [&](int64_t r, int64_t i) { return gate.get(r, i) * sigmoid(gate.get(r, i)) * dh.get(r, i); }, "dup");
  near(
      dgate,
      [&](int64_t r, int64_t i) {
        const double g = gate.get(r, i), s = sigmoid(g);
        return dh.get(r, i) * up.get(r, i) * s * (1 + g * (1 - s));
      },
      "dgate");
  check(again.all() == h.all(), "the recomputed h differs");
  Numbers g2(gate), u2(up), d2(dh);
  const auto m1 = g2.matrix(), m2 = u2.matrix(), m3 = d2.matrix();
  ok(dso_train_swiglu_backward(c, rows, n, &m1, &m2, &m3, &m1, &m2, &m3));
  near(g2, [&](int64_t r, int64_t i) { return dgate.get(r, i); }, "dgate in place");
  near(d2, [&](int64_t r, int64_t i) { return h.get(r, i); }, "h in place");
  Bytes all = h.all();
  append(all, dgate.all());
  append(all, dup.all());
  return all;
}

Bytes rotations(dso_context* c, int64_t tokens, int64_t heads, int64_t head_dim, int64_t half, int type, int64_t gap,
                bool interleaved, Random random) {
  Numbers x(tokens, heads * head_dim, type, gap), cosine(tokens, 2 * half, type), sine(tokens, 2 * half, type);
  for (Numbers* m : {&x, &cosine, &sine}) m->fill(random);
  Numbers y(tokens, heads * head_dim, type), back(tokens, heads * head_dim, type, gap);
  const int64_t in = x.n + gap;
  dso_train_rotation r = {1,   tokens,   heads, head_dim, half, 0, in,          head_dim, 0,
                          y.n, head_dim, 0,     2 * half, type, 1, interleaved, 0};
  ok(dso_train_rope(c, &r, x.bytes.get(), cosine.bytes.get(), sine.bytes.get(), y.bytes.get()));
  const auto side = [&](int64_t i) { return std::pair<int64_t, bool>(i % half, i >= half); };
  near(
      y,
      [&](int64_t t, int64_t at) {
        const int64_t head = at / head_dim * head_dim, i = at % head_dim;
        if (i >= 2 * half) return x.get(t, at);
        const auto [pair, right] = side(i);
        const double a = x.get(t, head + (interleaved ? 2 * pair : pair)),
                     b = x.get(t, head + (interleaved ? 2 * pair + 1 : pair + half));
        return right ? b * cosine.get(t, i) + a * sine.get(t, i) : a * cosine.get(t, i) - b * sine.get(t, i);
      },
      "rope");
  // The backward is the transpose: <rope x, g> = <x, back g>.
  Numbers g(tokens, heads * head_dim, type);
  g.fill(random);
  dso_train_rotation b = {1,  tokens,   heads, head_dim, half, 0, y.n,         head_dim, 0,
                          in, head_dim, 0,     2 * half, type, 1, interleaved, 1};
  ok(dso_train_rope(c, &b, g.bytes.get(), cosine.bytes.get(), sine.bytes.get(), back.bytes.get()));
  double left = 0, right = 0, size = 1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < x.n; ++i)
      left += y.get(t, i) * g.get(t, i), right += x.get(t, i) * back.get(t, i), size += std::fabs(y.get(t, i) * g.get(t, i));
  check(std::fabs(left - right) < bound(type) * size, "rope's backward is not its transpose: %g and %g", left, right);
  back.check_gaps("rope's backward");
  if (!interleaved) {
    dso_train_rotation same = r;
    same.out_token = in;
    ok(dso_train_rope(c, &same, x.bytes.get(), cosine.bytes.get(), sine.bytes.get(), x.bytes.get()));
    near(x, [&](int64_t t, int64_t i) { return y.get(t, i); }, "rope in place");
  }
  Bytes all = y.all();
  append(all, back.all());
  return all;
}

Bytes losses(dso_context* c, int64_t rows, int64_t n, int type, int gradient, int64_t gap, Random random) {
  Numbers x(rows, n, type, gap);
  x.fill(random, 5);
  std::vector<int64_t> labels((size_t)rows);
  for (int64_t r = 0; r < rows; ++r) labels[(size_t)r] = r % 4 == 3 ? -100 : random.below((int)n);
  Numbers logits(x);
  std::vector<double> found((size_t)rows, -7);
  const auto m = logits.matrix();
  ok(dso_train_cross_entropy(c, rows, n, &m, labels.data(), -100, 0.25f, gradient, found.data()));
  if (gradient < 0) {
    for (int64_t r = 0; type == DSO_TYPE_BF16 && r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) check(logits.get(r, i) == x.get(r, i), "logits were changed");
  }
  std::vector<double> sums((size_t)rows);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(x.get(r, i));
    sums[(size_t)r] = sum;
    const double exact = labels[(size_t)r] < 0 ? 0 : std::log(sum) - x.get(r, labels[(size_t)r]);
    check(std::fabs(found[(size_t)r] - exact) < 1e-6 * (1 + std::fabs(exact)), "loss %g, not %g", found[(size_t)r], exact);
    for (int64_t i = 0; gradient >= 0 && i < n; ++i) {
      uint32_t bits = 0;
      const size_t size = gradient == DSO_TYPE_BF16 ? 2 : 4;
      memcpy((uint8_t*)&bits + 4 - size, logits.bytes.get() + logits.at(r, 0) + (size_t)i * size, size);
      const double expected = labels[(size_t)r] < 0 ? 0 : 0.25 * (std::exp(x.get(r, i)) / sum - (i == labels[(size_t)r]));
      if (!check(std::fabs(from_bits(bits) - expected) <= (size == 2 ? 0x1p-8 : 1e-6) * std::fabs(expected) + 6e-8,
                 "gradient %g, not %g", (double)from_bits(bits), expected))
        break;
    }
  }
  logits.check_gaps("cross_entropy");
  Bytes all = bytes_of(found);
  if (gradient >= 0) append(all, logits.all());
  return all;
}

// One step of AdamW against double, with F32 moments; the other formats are tested against the reference in Python.
Bytes steps(dso_context* c, int64_t n, int master, int moments, int gradient_type, Random random) {
  const int weight_type = master == DSO_MASTER_NONE ? DSO_TYPE_F32 : DSO_TYPE_BF16;
  Numbers weights(1, n, weight_type), gradient(1, n, gradient_type), low_bits(1, n, DSO_TYPE_BF16);
  weights.fill(random);
  gradient.fill(random, 1e-3f);
  memset(low_bits.bytes.get(), 0, low_bits.bytes.size());
  const Numbers before(weights);
  const size_t width = moments == DSO_MOMENTS_F32 ? 4 : moments == DSO_MOMENTS_BF16 ? 2 : 1, blocks = (size_t)(n + 255) / 256;
  Buffer m((size_t)n * width, 0), v((size_t)n * width, 0), m_scale(blocks * 4, 0), v_scale(blocks * 4, 0);
  dso_train_update u = {};
  u.parameter = weights.bytes.get(), u.low = (int16_t*)low_bits.bytes.get(), u.gradient = gradient.bytes.get();
  u.m = m.get(), u.v = v.get(), u.m_scale = (float*)m_scale.get(), u.v_scale = (float*)v_scale.get();
  u.count = n, u.master = master, u.moments = moments, u.gradient_type = gradient_type;
  u.gradient_scale = 0.5f, u.beta1 = 0.9f, u.rest1 = 0.1f, u.beta2 = 0.999f, u.rest2 = 0.001f, u.bias2 = 31.622776f,
  u.eps = 1e-8f, u.step = 0.01f, u.decay = 0.001f;
  for (uint32_t& key : u.key) key = random.bits();
  ok(dso_train_adamw(c, &u, 1));
  Numbers old(before);
  for (int64_t i = 0; i < n; ++i) {
    const double g = 0.5 * gradient.get(0, i), w = old.get(0, i),
                 exact = w - (0.001 * w + 0.01 * 0.1 * g / (31.622776 * std::sqrt(0.001 * g * g) + 1e-8));
    double found = weights.get(0, i);
    if (master == DSO_MASTER_SPLIT) {
      int16_t low;
      memcpy(&low, low_bits.bytes.get() + 2 * i, 2);
      found = from_bits(to_bits((float)found) + (uint32_t)(int32_t)low);
    }
    const double tolerance = master == DSO_MASTER_STOCHASTIC ? 0x1p-7 : 2e-7;
    if (!check(std::fabs(found - exact) <= tolerance * (std::fabs(exact) + 0.01),
               "adamw (master %d, moments %d) of %lld at %lld: %g, not %g", master, moments, (long long)n, (long long)i, found,
               exact))
      break;
  }
  ok(dso_train_adamw(c, &u, 1));  // with stored moments
  Bytes all = weights.all();
  append(all, low_bits.all());
  for (Buffer* b : {&m, &v, &m_scale, &v_scale}) append(all, {b->get(), b->get() + b->size()});
  return all;
}

Bytes sums(dso_context* c, Random random) {
  std::vector<Numbers> tensors;
  tensors.reserve(8);
  for (const int64_t n : {0, 1, 31, 33, 16384, 40001}) tensors.emplace_back(1, n, (int)(n % 2)).fill(random, 1e15f);
  tensors[4].set(0, 5, NAN), tensors[4].set(0, 16383, INFINITY), tensors[4].set(0, 16, -INFINITY);
  std::vector<dso_train_numbers> all;
  for (Numbers& t : tensors) all.push_back({t.bytes.get(), t.n, t.type, 0});
  std::vector<double> found(all.size());
  std::vector<int64_t> odd(all.size());
  ok(dso_train_squares(c, all.data(), (int64_t)all.size(), found.data(), odd.data()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    double exact = 0;
    for (int64_t k = 0; k < tensors[i].n; ++k) exact += tensors[i].get(0, k) * tensors[i].get(0, k);
    check(odd[i] == (i == 4 ? 3 : 0), "%lld numbers of tensor %zu are not finite", (long long)odd[i], i);
    check(i == 4 || std::fabs(found[i] - exact) <= 1e-12 * exact, "squares %g, not %g", found[i], exact);
  }
  Numbers out(1, 40001, DSO_TYPE_BF16);
  out.fill(random, 1e15f);
  Numbers old(out);
  const dso_train_numbers into = {out.bytes.get(), 40001, DSO_TYPE_BF16, 0};
  ok(dso_train_scale(c, &all[5], 0.3f, 1, &into));
  near(out, [&](int64_t, int64_t i) { return old.get(0, i) + 0.3f * tensors[5].get(0, i); }, "scale");
  found.erase(found.begin() + 4);
  Bytes both = bytes_of(found);
  append(both, out.all());
  return both;
}

Bytes summed(dso_context* c, int64_t rows, int64_t n, int type, int result_type, bool adds, Random random) {
  const int64_t most = 40;
  Numbers x(rows, n, type, 2), result(most, n, result_type, 3);
  x.fill(random);
  result.fill(random);
  Numbers old(result);
  std::vector<int64_t> numbers((size_t)rows);
  for (int64_t& v : numbers) v = random.below(9) * 4;
  const auto mx = x.matrix(), mr = result.matrix();
  ok(dso_train_rows_summed(c, rows, n, &mx, numbers.data(), 8, most, &mr, adds));
  near(
      result,
      [&](int64_t v, int64_t i) {
        double total = adds ? old.get(v, i) : 0;
        for (int64_t r = 0; v != 8 && r < rows; ++r)
          if (numbers[(size_t)r] == v) total += x.get(r, i);
        return total;
      },
      "rows summed");
  return result.all();
}

Bytes everything(dso_context* c) {
  Bytes all;
  uint64_t seed = 0;
  for (int type : {DSO_TYPE_F32, DSO_TYPE_BF16})
    for (const auto& [rows, n] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 5}, {1, 1}, {2, 16}, {3, 31}, {5, 64}, {150, 33}, {1100, 48}, {7, 1000}})
      for (int64_t gap : {0, 3}) {
        if (n > 1)
          append(all, norms(c, rows, n, type, gap, Random(++seed)));  // for a row of one element dx is zero up to rounding
        append(all, gates(c, rows, n, type, gap, Random(++seed)));
        for (int gradient : {-1, (int)DSO_TYPE_F32, (int)DSO_TYPE_BF16})
          if (gradient != DSO_TYPE_F32 || type == DSO_TYPE_F32)
            append(all, losses(c, rows, n, type, gradient, gap, Random(++seed)));
      }
  for (const auto& [rows, n] : std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {1, 1}, {100, 17}, {500, 64}})
    for (int types = 0; types < 8; ++types)
      append(all, summed(c, rows, n, types & 1, types >> 1 & 1, types >> 2, Random(++seed)));
  append(all, losses(c, 3, 5001, DSO_TYPE_F32, DSO_TYPE_BF16, 1, Random(++seed)));
  for (int type : {DSO_TYPE_F32, DSO_TYPE_BF16})
    for (bool interleaved : {false, true})
      for (const auto& [dim, half] : std::vector<std::pair<int64_t, int64_t>>{{64, 32}, {64, 16}, {2, 1}, {70, 33}, {192, 32}})
        append(all, rotations(c, 9, 3, dim, half, type, interleaved ? 5 : 0, interleaved, Random(++seed)));
  for (int master : {DSO_MASTER_NONE, DSO_MASTER_SPLIT, DSO_MASTER_STOCHASTIC})
    for (int moments : {DSO_MOMENTS_F32, DSO_MOMENTS_BF16, DSO_MOMENTS_INT8})
      for (int64_t n : {1, 17, 256, 300, 40000}) append(all, steps(c, n, master, moments, (int)(n % 2), Random(++seed)));
  append(all, sums(c, Random(++seed)));
  return all;
}

void refusals(dso_context* c) {
  Numbers x(2, 4, DSO_TYPE_F32), y(2, 4, DSO_TYPE_BF16);
  const auto mx = x.matrix(), my = y.matrix();
  std::vector<double> found(2);
  const std::vector<int64_t> labels = {1, 4};
  const auto refused = [](int32_t code, const char* word) {
    check(code == DSO_EINVAL && std::string(dso_last_error()).find(word) != std::string::npos, "code %d: %s", code,
          dso_last_error());
  };
  refused(dso_train_cross_entropy(c, 2, 4, &mx, labels.data(), -100, 1, -1, found.data()), "labels[1] is 4");
  refused(dso_train_swiglu(c, 2, 4, &mx, &my, &mx), "up must have the type");
  refused(dso_train_swiglu(c, 2, 5, &mx, &mx, &mx), "ld is 4");
  refused(dso_train_rms_norm(c, 2, 4, &mx, nullptr, 1e-5f, &mx, (float*)y.bytes.get()), "weight is NULL");
  refused(dso_train_rows_summed(c, 2, 4, &mx, labels.data(), -1, 4, &mx, 0), "numbers[1] is 4");
  dso_train_update u = {};
  u.count = 1;
  refused(dso_train_adamw(c, &u, 1), "parameter is NULL");
  u.moments = 9;
  refused(dso_train_adamw(c, &u, 1), "moments is 9");
}

}  // namespace

int main() {
  Bytes first;
  for (const Variant& v : vector_variants())
    for (int threads : {1, 2, 3}) {
      if (threads != 1 && v.name != isas().front().name && !has_dot_bf16(v.name)) continue;
      Context c(v.name, threads);
      const Bytes found = everything(c.c);
      if (first.empty()) first = found;
      check(found == first, "%s with %d threads: other bits than the first variant with one", v.name.c_str(), threads);
      refusals(c.c);
    }
  return report("test_train_elementwise");
}
