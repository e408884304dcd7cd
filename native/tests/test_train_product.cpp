// Products of training on every variant: close to the product in double over random and odd shapes, orders, types and strides,
// bitwise equal to the guaranteed chain where it is one of fp32; the same bits for any number of threads; groups equal to
// single products; NaN and infinity are preserved; nothing written outside, nothing read past a row.
#include <algorithm>

#include "check.hpp"
#include "dso_train.h"
#include "exact_fma.hpp"

namespace {
constexpr const char* form_names[] = {"NT", "NN", "TN"};

struct Numbers {  // rows x cols, with `gap` NaN elements between rows
  int64_t rows, cols, gap;
  int type;
  Buffer bytes;
  std::vector<float> values;

  Numbers(int64_t rows, int64_t cols, int64_t gap, int type)
      : rows(rows),
        cols(cols),
        gap(gap),
        type(type),
        bytes((size_t)std::max<int64_t>(0, rows * (cols + gap) - gap) * size(), 0xff),
        values((size_t)(rows * cols)) {}

  size_t size() const { return type == DSO_TYPE_BF16 ? 2 : 4; }
  size_t at(int64_t r, int64_t c) const { return (size_t)(r * (cols + gap) + c) * size(); }
  float get(int64_t r, int64_t c) {
    uint32_t bits = 0;
    if (type == DSO_TYPE_F32)
      memcpy(&bits, &bytes[at(r, c)], 4);
    else
      memcpy((uint8_t*)&bits + 2, &bytes[at(r, c)], 2);
    return from_bits(bits);
  }
  void set(int64_t r, int64_t c, float x) {
    if (type == DSO_TYPE_BF16) x = rounded_bf16(x);
    const uint32_t bits = to_bits(x);
    if (type == DSO_TYPE_F32)
      memcpy(&bytes[at(r, c)], &bits, 4);
    else
      memcpy(&bytes[at(r, c)], (const uint8_t*)&bits + 2, 2);
    values[(size_t)(r * cols + c)] = x;
  }
  void fill(Random& random) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) set(r, c, random.normal());
  }
  void check_gaps(const char* what) {
    for (int64_t r = 0; r + 1 < rows; ++r)
      for (size_t i = at(r, cols); i < at(r + 1, 0); ++i)
        if (!check(bytes[i] == 0xff, "%s: byte %zu between rows was written", what, i)) return;
  }
  dso_train_matrix matrix(int64_t next = 0) { return {bytes.get(), cols + gap, next, type, 0}; }
};

struct Context {
  dso_context* c = nullptr;
  Context(const std::string& isa, int threads) {
    check(dso_context_create(isa.c_str(), threads, &c) == DSO_OK, "%s", dso_last_error());
  }
  ~Context() { dso_context_destroy(c); }
};

struct Case {
  int form, flags;
  int64_t M, N, K;
  int a_type, b_type, c_type;
  bool bias;
};

std::string text(const std::string& isa, const Case& c) {
  char s[200];
  snprintf(s, sizeof s, "%s %s [%lld x %lld x %lld] types %d %d %d flags %d bias %d", isa.c_str(), form_names[c.form],
           (long long)c.M, (long long)c.N, (long long)c.K, c.a_type, c.b_type, c.c_type, c.flags, c.bias);
  return s;
}

struct Operands {
  Numbers a, b, bias, c;
  Operands(const Case& k, Random& random)
      : a(k.form == DSO_PRODUCT_TN ? k.K : k.M, k.form == DSO_PRODUCT_TN ? k.M : k.K, random.below(4), k.a_type),
        b(k.form == DSO_PRODUCT_NT ? k.N : k.K, k.form == DSO_PRODUCT_NT ? k.K : k.N, random.below(4), k.b_type),
        bias(1, k.N, 0, random.below(2)),
        c(k.M, k.N, random.below(4), k.c_type) {
    a.fill(random), b.fill(random), bias.fill(random), c.fill(random);
  }
  float left(const Case& k, int64_t m, int64_t i) const {
    return a.values[(size_t)(k.form == DSO_PRODUCT_TN ? i * k.M + m : m * k.K + i)];
  }
  float right(const Case& k, int64_t n, int64_t i) const {
    return b.values[(size_t)(k.form == DSO_PRODUCT_NT ? n * k.K + i : i * k.N + n)];
  }
};

bool run(const Context& context, const Case& k, Operands& o) {
  const dso_train_matrix a = o.a.matrix(), b = o.b.matrix(), bias = o.bias.matrix(), c = o.c.matrix();
  return check(dso_train_product(context.c, k.form, k.flags, k.M, k.N, k.K, &a, &b, k.bias ? &bias : nullptr, &c) == DSO_OK,
               "%s", dso_last_error());
}

// Whether an element of C is a plain chain of fused multiply-adds in fp32.
bool chained(const std::string& isa, const Case& k) { return (k.flags & DSO_PRODUCT_EXACT) || !has_dot_bf16(isa); }

void against_double(const std::string& isa, const Case& k, Operands& o) {
  const std::string name = text(isa, k);
  const bool exact = k.flags & DSO_PRODUCT_EXACT, add = k.flags & DSO_PRODUCT_ADD;
  for (int64_t m = 0; m < k.M; ++m)
    for (int64_t n = 0; n < k.N; ++n) {
      double sum = 0, size = 0;
      float chain = 0;
      for (int64_t i = 0; i < k.K; ++i) {
        float x = o.left(k, m, i), y = o.right(k, n, i);
        if (!exact) x = rounded_bf16(x), y = rounded_bf16(y);
        sum += (double)x * y, size += std::fabs((double)x * y);
        chain = exact_fma(x, y, chain);
      }
      if (k.bias)
        sum += o.bias.values[(size_t)n], size += std::fabs(o.bias.values[(size_t)n]), chain += o.bias.values[(size_t)n];
      const float old = o.c.values[(size_t)(m * k.N + n)], got = o.c.get(m, n);
      if (add) sum += old, size += std::fabs(old), chain += old;
      // K + 2 operations of half a unit of fp32 each, on sums no larger than `size`, and the rounding of the result.
      const double bound =
          (double)(k.K + 2) * std::ldexp(size, -24) + (k.c_type == DSO_TYPE_BF16 ? std::ldexp(std::fabs(sum), -8) : 0) + 1e-37;
      if (!check(std::fabs(got - sum) <= bound, "%s: C[%lld, %lld] is %.9g, not %.9g within %.2g", name.c_str(), (long long)m,
                 (long long)n, got, sum, bound))
        return;
      const float promised = k.c_type == DSO_TYPE_BF16 ? rounded_bf16(chain) : chain;
      if (chained(isa, k) && !check(same(got, promised), "%s: C[%lld, %lld] is %.9g, the chain %.9g", name.c_str(),
                                    (long long)m, (long long)n, got, promised))
        return;
    }
  o.c.check_gaps(name.c_str());
}

Case random_case(Random& random) {
  const int sizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 70, 97};
  Case k{random.below(3),         0,
         sizes[random.below(16)], sizes[random.below(16)],
         sizes[random.below(16)], random.below(2),
         random.below(2),         random.below(2),
         random.below(3) == 0};
  if (random.below(4) == 0) k.K = 500 + random.below(700);  // more than a depth
  if (random.below(12) == 0) k.K = 0;
  if (random.below(2)) k.flags |= DSO_PRODUCT_ADD;
  if (random.below(3) == 0) k.flags |= DSO_PRODUCT_EXACT;
  return k;
}

void products(const Variant& v) {
  Random random(1);
  const Context context(v.name, 1);
  for (int i = 0; i < rounds(160); ++i) {
    const Case k = random_case(random);
    Operands o(k, random);
    if (run(context, k, o)) against_double(v.name, k, o);
  }
}

std::vector<uint8_t> bytes_of(Buffer& b) { return {b.get(), b.get() + b.size()}; }

void threads(const Variant& v) {
  const Context one(v.name, 1), two(v.name, 2), three(v.name, 3);
  for (int i = 0; i < rounds(12); ++i) {
    Random random((uint64_t)(100 + i));
    Case k = random_case(random);
    k.M += random.below(500), k.N += random.below(200);
    std::vector<uint8_t> first;
    for (const Context* context : {&one, &two, &three}) {
      Random again((uint64_t)i);
      Operands o(k, again);
      if (!run(*context, k, o)) return;
      if (first.empty())
        first = bytes_of(o.c.bytes);
      else
        check(first == bytes_of(o.c.bytes), "%s: other bits with other threads", text(v.name, k).c_str());
    }
  }
}

// Groups against single products, bit for bit.
void groups(const Variant& v) {
  const Context context(v.name, 2);
  for (int i = 0; i < rounds(30); ++i) {
    Random random((uint64_t)(7 + i));
    const int count = 1 + random.below(5), form = i % 3, flags = random.below(2) ? DSO_PRODUCT_ADD : 0;
    const int64_t N = 1 + random.below(70), other = 1 + random.below(70);  // of `other`: K, or M of TN
    std::vector<int64_t> offsets = {0};
    for (int g = 0; g < count; ++g) offsets.push_back(offsets.back() + (random.below(3) ? random.below(60) : 0));
    const int64_t T = offsets.back();
    const int type = random.below(2), c_type = random.below(2);
    const bool tn = form == DSO_PRODUCT_TN, nt = form == DSO_PRODUCT_NT;
    const int64_t rows = tn ? other : nt ? N : other, cols = tn ? N : nt ? other : N;  // of a matrix of the stack
    Numbers a(T, other, random.below(3), type), b(tn ? T : count * rows, cols, random.below(3), type),
        c(tn ? count * rows : T, N, random.below(3), c_type);
    a.fill(random), b.fill(random), c.fill(random);
    Numbers want(c.rows, c.cols, c.gap, c_type);
    memcpy(want.bytes.get(), c.bytes.get(), c.bytes.size());
    const dso_train_matrix ma = a.matrix(), mb = b.matrix(rows * (cols + b.gap)), mc = c.matrix(rows * (N + c.gap));
    if (!check(
            dso_train_grouped_product(context.c, form, flags, count, offsets.data(), other, N, other, &ma, &mb, &mc) == DSO_OK,
            "%s", dso_last_error()))
      return;
    for (int g = 0; g < count; ++g) {
      const int64_t from = offsets[(size_t)g], n = offsets[(size_t)g + 1] - from;
      dso_train_matrix ga = ma, gb = mb, gc = want.matrix();
      ga.data = a.bytes.get() + a.at(from, 0);
      gb.data = b.bytes.get() + (tn ? b.at(from, 0) : b.at(g * rows, 0));
      gc.data = want.bytes.get() + (tn ? want.at(g * rows, 0) : want.at(from, 0));
      check(dso_train_product(context.c, form, flags, tn ? other : n, N, tn ? n : other, &ga, &gb, nullptr, &gc) == DSO_OK,
            "%s", dso_last_error());
    }
    check(bytes_of(c.bytes) == bytes_of(want.bytes), "%s %s in %d groups of %lld rows: not the products one by one",
          v.name.c_str(), form_names[form], count, (long long)T);
  }
}

void specials(const Variant& v) {
  const Context context(v.name, 1);
  Random random(3);
  for (int i = 0; i < rounds(40); ++i) {
    Case k = random_case(random);
    k.K += 1, k.bias = false, k.flags &= ~DSO_PRODUCT_ADD;
    Operands o(k, random);
    const int64_t m = random.below((int)k.M), d = random.below((int)k.K);
    const float special = random.below(2) ? NAN : INFINITY;
    k.form == DSO_PRODUCT_TN ? o.a.set(d, m, special) : o.a.set(m, d, special);
    if (!run(context, k, o)) return;
    for (int64_t r = 0; r < k.M; ++r)
      for (int64_t n = 0; n < k.N; ++n)
        if (!check(std::isfinite(o.c.get(r, n)) == (r != m), "%s: row %lld of C is %g, row %lld of A has %g",
                   text(v.name, k).c_str(), (long long)r, o.c.get(r, n), (long long)m, special))
          return;
  }
}

void sums(const Variant& v) {
  const Context context(v.name, 2);
  Random random(4);
  for (int i = 0; i < rounds(30); ++i) {
    const int64_t T = random.below(50), N = 1 + random.below(600);
    Numbers x(T, N, random.below(3), random.below(2)), s(1, N, 0, random.below(2));
    x.fill(random), s.fill(random);
    const int flags = random.below(2) ? DSO_PRODUCT_ADD : 0;
    const dso_train_matrix mx = x.matrix(), ms = s.matrix();
    if (!check(dso_train_column_sums(context.c, flags, T, N, &mx, &ms) == DSO_OK, "%s", dso_last_error())) return;
    for (int64_t n = 0; n < N; ++n) {
      float sum = 0;
      for (int64_t t = 0; t < T; ++t) sum += x.values[(size_t)(t * N + n)];
      if (flags) sum += s.values[(size_t)n];
      if (s.type == DSO_TYPE_BF16) sum = rounded_bf16(sum);
      if (!check(same(s.get(0, n), sum), "%s: sum of column %lld of %lld x %lld is %.9g, not %.9g", v.name.c_str(),
                 (long long)n, (long long)T, (long long)N, s.get(0, n), sum))
        return;
    }
  }
}

void refusals() {
  const Context context(isas().front().name, 1);
  Numbers a(4, 4, 0, DSO_TYPE_F32), c(4, 4, 0, DSO_TYPE_F32);
  const dso_train_matrix good = a.matrix(), to = c.matrix();
  const auto refused = [&](const char* what, int form, int flags, int64_t M, const dso_train_matrix& left,
                           const dso_train_matrix* right) {
    check(dso_train_product(context.c, form, flags, M, 4, 4, &left, right, nullptr, &to) == DSO_EINVAL &&
              strstr(dso_last_error(), what),
          "not refused for %s: %s", what, dso_last_error());
  };
  dso_train_matrix bad = good;
  refused("form", 3, 0, 4, good, &good);
  refused("flags", 0, 4, 4, good, &good);
  refused("b is NULL", 0, 0, 4, good, nullptr);
  refused("-1 x 4", 0, 0, -1, good, &good);
  bad.ld = 3, refused("a.ld", 0, 0, 4, bad, &good);
  bad = good, bad.type = 2, refused("a.type", 0, 0, 4, bad, &good);
  bad = good, bad.data = nullptr, refused("a.data", 0, 0, 4, bad, &good);
  const int64_t offsets[] = {0, 3, 2};
  check(dso_train_grouped_product(context.c, 0, 0, 2, offsets, 4, 4, 4, &good, &good, &to) == DSO_EINVAL &&
            strstr(dso_last_error(), "offsets[2]"),
        "descending offsets: %s", dso_last_error());
}
}  // namespace

int main() {
  for (const Variant& v : variants()) products(v), threads(v), groups(v), specials(v), sums(v);
  refusals();
  return report("test_train_product");
}
