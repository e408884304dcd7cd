// Attention outside a plan on every variant: softmax in double over random shapes, in vectors that end where the data does;
// the errors of the C interface.
#include <algorithm>

#include "plan_parts.hpp"

namespace {

uint16_t bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float number(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
float number(float x) { return x; }
void put(uint16_t& to, float x) { to = bf16_of(x); }
void put(float& to, float x) { to = x; }

template <class Number>
struct Case {
  int64_t batch, heads, kv_heads, queries, keys, qk_width, v_width;
  std::vector<Number> q, k, v, o, numbers;
  std::vector<uint8_t> bytes;
  dso_dense_attention call{};

  Case(Random& random, int32_t mask) {
    const int64_t widths[] = {1, 7, 16, 31, 64, 80};
    batch = 1 + random.below(2), kv_heads = 1 + random.below(2), heads = kv_heads * (1 + random.below(3));
    queries = 1 + random.below(random.below(2) ? 3 : 150), keys = 1 + random.below(140), qk_width = widths[random.below(6)];
    if (mask == DSO_MASK_CAUSAL) keys += queries;
    v_width = widths[random.below(6)];
    const auto fill = [&](std::vector<Number>& x, int64_t n) {
      x.resize(size_t(n));
      for (Number& value : x) put(value, random.normal());
    };
    fill(q, batch * heads * queries * qk_width), fill(k, batch * kv_heads * keys * qk_width);
    fill(v, batch * kv_heads * keys * v_width), o.resize(size_t(batch * heads * queries * v_width));
    call.type = sizeof(Number) == 2 ? DSO_TYPE_BF16 : DSO_TYPE_F32;
    call.mask_type = mask;
    call.batch = batch, call.heads = heads, call.kv_heads = kv_heads, call.queries = queries, call.keys = keys;
    call.qk_width = qk_width, call.v_width = v_width, call.scale = 0.3f;
    call.q = {q.data(), heads * queries * qk_width, queries * qk_width, qk_width};
    call.k = {k.data(), kv_heads * keys * qk_width, keys * qk_width, qk_width};
    call.v = {v.data(), kv_heads * keys * v_width, keys * v_width, v_width};
    call.o = {o.data(), heads * queries * v_width, queries * v_width, v_width};
    if (mask == DSO_MASK_NUMBERS) {
      fill(numbers, queries * keys), call.mask = {numbers.data(), 0, 0, keys};
      const float hidden[] = {-3.3895314e38f, -INFINITY};  // the lowest bf16: the query sees all keys equally; none
      for (int64_t i = 0; i < std::min<int64_t>(2, queries); ++i)
        for (int64_t t = 0; t < keys; ++t) put(numbers[size_t(i * keys + t)], hidden[i]);
    }
    if (mask == DSO_MASK_BYTES) {
      bytes.resize(size_t(queries * keys));
      for (uint8_t& byte : bytes) byte = uint8_t(random.below(3) > 0);
      std::fill(bytes.begin(), bytes.begin() + keys, uint8_t(0));  // the first query sees nothing
      call.mask = {bytes.data(), 0, 0, keys};
    }
  }

  std::vector<double> expected(int64_t b, int64_t h, int64_t i) const {  // of a query's row
    const int64_t g = h / (heads / kv_heads);
    std::vector<double> s(size_t(keys), 0.0), row(size_t(v_width), 0.0);
    double top = -INFINITY, total = 0;
    for (int64_t t = 0; t < keys; ++t) {
      for (int64_t d = 0; d < qk_width; ++d)
        s[size_t(t)] += double(number(q[size_t(((b * heads + h) * queries + i) * qk_width + d)])) *
                        number(k[size_t(((b * kv_heads + g) * keys + t) * qk_width + d)]);
      s[size_t(t)] *= double(call.scale);
      if (!numbers.empty()) s[size_t(t)] += number(numbers[size_t(i * keys + t)]);
      if (!bytes.empty() && !bytes[size_t(i * keys + t)]) s[size_t(t)] = -INFINITY;
      if (call.mask_type == DSO_MASK_CAUSAL && t > i + keys - queries) s[size_t(t)] = -INFINITY;
      top = std::max(top, s[size_t(t)]);
    }
    if (top == -INFINITY) return row;
    for (int64_t t = 0; t < keys; ++t) {
      const double p = std::exp(s[size_t(t)] - top);
      total += p;
      for (int64_t c = 0; c < v_width; ++c)
        row[size_t(c)] += p * number(v[size_t(((b * kv_heads + g) * keys + t) * v_width + c)]);
    }
    for (double& x : row) x /= total;
    return row;
  }
};

template <class Number>
void equals_double(const Variant& variant, uint64_t seed, int32_t mask, bool rounded) {
  Random random(seed);
  Case<Number> one(random, mask);
  one.call.rounded = rounded;
  OwnContext context(*variant.kernels, 2);
  if (!check(dso_attend(context.c, &one.call) == DSO_OK, "%s: %s", variant.name.c_str(), dso_last_error())) return;
  // Logits of bf16 tensors are exact, those of rounded ones have errors of 2^-9 in both factors.
  const double bound = rounded ? 1.0 / 16 : sizeof(Number) == 2 ? 1.0 / 64 : 2e-5;
  for (int64_t at = 0; at < int64_t(one.o.size()); at += one.v_width) {
    const int64_t row = at / one.v_width, i = row % one.queries, h = row / one.queries % one.heads,
                  b = row / one.queries / one.heads;
    const std::vector<double> right = one.expected(b, h, i);
    for (int64_t c = 0; c < one.v_width; ++c) {
      const double found = number(one.o[size_t(at + c)]);
      if (!check(std::abs(found - right[size_t(c)]) <= bound, "%s, seed %d, mask %d: element %lld is %g, expected %g",
                 variant.name.c_str(), int(seed), mask, (long long)(at + c), found, right[size_t(c)]))
        return;
    }
  }
}

void errors() {
  OwnContext context(*variants()[0].kernels, 1);
  Random random(1);
  const auto refused = [&](const char* words, auto&& spoil) {
    Case<float> one(random, DSO_MASK_BYTES);
    spoil(one.call);
    refuses(dso_attend(context.c, &one.call), DSO_EINVAL, words, words);
  };
  refuses(dso_attend(context.c, nullptr), DSO_EINVAL, "attention is NULL", "no call");
  refused("unknown type 2", [](dso_dense_attention& a) { a.type = 2; });
  refused("unknown mask_type 4", [](dso_dense_attention& a) { a.mask_type = 4; });
  refused("at least as many keys as queries",
          [](dso_dense_attention& a) { a.mask_type = DSO_MASK_CAUSAL, a.keys = a.queries - 1; });
  refused("keys is -1", [](dso_dense_attention& a) { a.keys = -1; });
  refused("cannot share", [](dso_dense_attention& a) { a.heads = 5, a.kv_heads = 2; });
  refused("q.data is NULL", [](dso_dense_attention& a) { a.q.data = nullptr; });
  refused("mask.data is NULL", [](dso_dense_attention& a) { a.mask.data = nullptr; });
  Case<float> empty(random, DSO_MASK_NONE);
  empty.call.batch = 0, empty.call.q.data = nullptr;
  check(dso_attend(context.c, &empty.call) == DSO_OK, "an empty batch: %s", dso_last_error());
  Case<float> none(random, DSO_MASK_NONE);
  none.call.keys = 0, none.call.k.data = none.call.v.data = nullptr;
  check(dso_attend(context.c, &none.call) == DSO_OK && none.o[0] == 0, "no keys: %s", dso_last_error());
}

}  // namespace

int main() {
  for (const Variant& variant : variants())
    for (uint64_t seed = 0; seed < (uint64_t)rounds(60); ++seed)
      for (int32_t mask : {DSO_MASK_NONE, DSO_MASK_BYTES, DSO_MASK_NUMBERS, DSO_MASK_CAUSAL}) {
        equals_double<float>(variant, seed, mask, false);
        equals_double<float>(variant, seed, mask, true);
        equals_double<uint16_t>(variant, seed, mask, false);
      }
  errors();
  return report("test_dense_attention");
}
