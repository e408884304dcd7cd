// LORA_DOWN and LORA_UP through the C interface: against plain double arithmetic, with the same bits on every ISA, for any
// number of threads, alone and beside other sequences.
#include "adapters.hpp"
#include "plan_parts.hpp"

namespace {

struct Sizes {
  int32_t cols, rows, max_rank;
};

struct Pair {
  int32_t rank;
  std::vector<float> a, b;  // [rank, cols], [rows, rank]
};

float stored(float x, int32_t format) {
  return format == DSO_F32 ? x : from_bits((to_bits(x) + 0x7fff + (to_bits(x) >> 16 & 1)) & 0xffff0000u);
}

int64_t tiled_bytes(int32_t rows, int32_t cols, int32_t format) {
  return (rows + 15) / 16 * 64 * (format == DSO_F32 ? cols : (cols + 1) / 2);
}

// In tiles of 16 rows, [ceil(rows / 16)][cols][16], or in pairs of columns, [ceil(rows / 16)][ceil(cols / 2)][16][2].
dso_weight tiled(const std::vector<float>& w, int32_t rows, int32_t cols, int32_t format,
                 std::vector<std::unique_ptr<Buffer>>& keep) {
  const bool wide = format == DSO_F32;
  const size_t bytes = (size_t)tiled_bytes(rows, cols, format);
  Buffer& tiles = *keep.emplace_back(std::make_unique<Buffer>(bytes, 0));
  for (int32_t r = 0; r < rows; ++r)
    for (int32_t c = 0; c < cols; ++c) {
      const uint32_t bits = to_bits(stored(w[(size_t)(r * cols + c)], format));
      const size_t place = wide ? ((size_t)(r / 16 * cols + c) * 16 + (size_t)(r % 16)) * 4
                                : ((size_t)(r / 16 * ((cols + 1) / 2) + c / 2) * 32 + (size_t)(r % 16 * 2 + c % 2)) * 2;
      if (wide)
        memcpy(&tiles[place], &bits, 4);
      else
        tiles[place] = (uint8_t)(bits >> 16), tiles[place + 1] = (uint8_t)(bits >> 24);
    }
  return {format, rows, cols, 0, tiles.get(), (int64_t)bytes};
}

// A plan whose last hidden state is y + (x A^T) B^T, padded with columns of x. With rows of F32, y is x[:, :rows]; with others,
// the step is a LINEAR over rows of this kind and a matrix of zeros, so y is 0.
class Adapted {
 public:
  Adapted(const Sizes& s, const std::vector<Pair>& pairs, int32_t format, const Kernels& kernels, int threads,
          int32_t kind = DSO_SLOT_F32)
      : s(s), context(kernels, threads) {
    auto slot = [](int32_t width, int32_t kind = DSO_SLOT_F32) { return dso_slot{kind, width, 0, 0}; };
    const bool plain = kind == DSO_SLOT_F32;
    const dso_slot slots[] = {slot(s.cols),          slot(s.rows), slot(s.max_rank, low_rank_kind(kind)),
                              slot(s.cols - s.rows), slot(s.cols), slot(s.cols, kind)};
    std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0}),
                                   plain ? step_of(DSO_OP_COLUMNS, {0}, {1}) : step_of(DSO_OP_CONVERT, {0}, {5}),
                                   step_of(DSO_OP_LORA_DOWN, {plain ? 0 : 5}, {2}),
                                   plain ? step_of(DSO_OP_LORA_UP, {2, 1}, {1}) : step_of(DSO_OP_LINEAR, {5, 2}, {1}, {0}),
                                   step_of(DSO_OP_COLUMNS, {0}, {3}),
                                   step_of(DSO_OP_CONCAT, {1, 3}, {4}),
                                   step_of(DSO_OP_HIDDEN_OUT, {4}, {})};
    for (int i : {1, 4}) steps[(size_t)i].groups = 1;
    steps[4].offset = s.rows;
    for (int i : {2, 3}) steps[(size_t)i].rank = s.max_rank;
    steps[6].flags = DSO_FLAG_LAST;
    const int32_t zeros = kind == DSO_SLOT_BF16 ? DSO_BF16 : DSO_INT8;
    const dso_weight w =
        packed_weight(context.c, zeros, std::vector<float>((size_t)(s.rows * s.cols)), 0, s.rows, s.cols, keep_);
    check(dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots, 6, &w, 1, 6, &plan) == 0, "plan: %s",
          dso_last_error());
    const dso_adapter_site site = {s.rows, s.cols, 0};
    check(dso_adapters_create(&site, 1, (int32_t)pairs.size() + 1, s.max_rank, &adapters) == 0, "adapters: %s",
          dso_last_error());
    for (size_t i = 0; i < pairs.size(); ++i) {  // the last slot stays empty
      const dso_weight a = tiled(pairs[i].a, pairs[i].rank, s.cols, format, keep_),
                       b = tiled(pairs[i].b, s.rows, pairs[i].rank, format, keep_);
      check(dso_adapters_set(adapters, (int32_t)i, 0, &a, &b) == 0, "set: %s", dso_last_error());
    }
  }
  ~Adapted() {
    dso_plan_destroy(plan);
    dso_adapters_destroy(adapters);
  }

  // Rows of sequences with these lengths and adapters.
  std::vector<float> run(const std::vector<float>& x, const std::vector<int32_t>& lengths, const std::vector<int32_t>& slots,
                         int32_t expected = 0) {
    const std::vector<int32_t> zeros(lengths.size());
    std::vector<float> last(x.size(), NAN);
    dso_batch b{};
    b.T = (int32_t)(x.size() / (size_t)s.cols);
    b.S = (int32_t)lengths.size();
    b.query_len = lengths.data();
    b.context_len = b.phase = zeros.data();
    b.states = x.data();
    b.last_hidden = last.data();
    b.adapter_of = slots.empty() ? nullptr : slots.data();
    b.adapters = adapters;
    check(dso_plan_run(plan, &b) == expected, "run: %s", dso_last_error());
    return last;
  }

  const Sizes s;
  OwnContext context;
  dso_plan* plan = nullptr;
  dso_adapters* adapters = nullptr;

 private:
  std::vector<std::unique_ptr<Buffer>> keep_;
};

// The numbers that a row of this kind stands for, where adapters read it: codes of Q8 rounded to bf16.
void as_read(int32_t kind, float* x, int32_t n) {
  if (kind == DSO_SLOT_BF16)
    for (int32_t i = 0; i < n; ++i) x[i] = stored(x[i], DSO_BF16);
  if (kind != DSO_SLOT_Q8 && kind != DSO_SLOT_Q16) return;
  const float steps = kind == DSO_SLOT_Q8 ? 127 : 32512;
  for (int32_t group = 0; group < n; group += 32) {
    const int32_t end = std::min(n, group + 32);
    float top = 0;
    for (int32_t i = group; i < end; ++i) top = std::max(top, std::abs(x[i]));
    for (int32_t i = group; i < end; ++i) {
      const float number = std::nearbyint(x[i] * (steps / top)) * (top / steps);
      x[i] = kind == DSO_SLOT_Q8 ? stored(number, DSO_BF16) : number;
    }
  }
}

void on_every_isa(const Sizes& s, int32_t kind, int32_t format) {
  Random random((uint64_t)(s.cols + s.rows));
  std::vector<Pair> pairs;
  for (int32_t rank : {1, s.max_rank / 2 + 1, s.max_rank})
    pairs.push_back({rank, normal((size_t)(rank * s.cols), 0.2f, random), normal((size_t)(s.rows * rank), 0.2f, random)});
  const std::vector<int32_t> lengths = {1, 1, 70, 3, 1, 2, 9}, slots = {0, 0, 2, -1, 3, 1, 1};  // 3 is empty
  int32_t T = 0;
  for (int32_t n : lengths) T += n;
  const std::vector<float> x = normal((size_t)(T * s.cols), 1, random);
  std::vector<float> read = x;
  for (int32_t t = 0; t < T; ++t) as_read(kind, &read[(size_t)(t * s.cols)], s.cols);
  std::vector<double> exact((size_t)(T * s.rows)), rounding((size_t)(T * s.rows));  // rounding: what that of h may add
  std::vector<int32_t> slot_of;
  for (size_t i = 0; i < lengths.size(); ++i) slot_of.insert(slot_of.end(), (size_t)lengths[i], slots[i]);
  for (int32_t t = 0; t < T; ++t)
    for (int32_t n = 0; n < s.rows; ++n) {
      double& y = exact[(size_t)(t * s.rows + n)] = kind == DSO_SLOT_F32 ? x[(size_t)(t * s.cols + n)] : 0;
      if (slot_of[(size_t)t] < 0 || slot_of[(size_t)t] > 2) continue;
      const Pair& p = pairs[(size_t)slot_of[(size_t)t]];
      for (int32_t r = 0; r < p.rank; ++r) {
        double h = 0;
        for (int32_t k = 0; k < s.cols; ++k)
          h += double(read[(size_t)(t * s.cols + k)]) * stored(p.a[(size_t)(r * s.cols + k)], format);
        const double part = h * stored(p.b[(size_t)(n * p.rank + r)], format);
        y += part;
        if (low_rank_kind(kind) == DSO_SLOT_BF16) rounding[(size_t)(t * s.rows + n)] += std::abs(part) * 0x1.01p-8;
      }
    }
  double largest = 0;
  for (double y : exact) largest = std::max(largest, std::abs(y));
  // The bits are those of every ISA, except where some multiply pairs of bf16.
  const bool pairs_of_bf16 = format == DSO_BF16 && low_rank_kind(kind) == DSO_SLOT_BF16;
  std::vector<float> first;
  for (const Variant& v : variants()) {
    if (pairs_of_bf16) first.clear();
    for (int threads : {1, 3}) {
      Adapted adapted(s, pairs, format, *v.kernels, threads, kind);
      const std::vector<float> whole = adapted.run(x, lengths, slots), plain = adapted.run(x, lengths, {});
      for (int32_t t = 0; t < T; ++t)
        for (int32_t n = 0; n < s.rows; ++n) {
          const size_t i = (size_t)(t * s.rows + n);
          const double error = std::abs(whole[(size_t)(t * s.cols + n)] - exact[i]);
          check(error <= rounding[i] + 2e-6 * largest, "%s, kind %d: row %d, column %d is off by %g", v.name.c_str(), kind, t,
                n, error);
          if (slot_of[(size_t)t] < 0 || slot_of[(size_t)t] == 3)
            check(same(whole[(size_t)(t * s.cols + n)], plain[(size_t)(t * s.cols + n)]), "%s: row %d changed", v.name.c_str(),
                  t);
        }
      if (first.empty()) first = whole;
      check(whole == first, "%s, %d threads, kind %d: other bits", v.name.c_str(), threads, kind);
      if (kind == DSO_SLOT_F32) check(plain == x, "%s: rows without an adapter changed", v.name.c_str());
      check(adapted.run(x, lengths, slots) == whole, "%s: other bits in the second run", v.name.c_str());
      for (int32_t t : {0, 5, T - 1}) {  // alone
        const std::vector<float> row(&x[(size_t)(t * s.cols)], &x[(size_t)(t * s.cols)] + s.cols);
        const std::vector<float> alone = adapted.run(row, {1}, {slot_of[(size_t)t]});
        check(std::equal(alone.begin(), alone.end(), whole.begin() + (long)t * s.cols), "%s: row %d has other bits alone",
              v.name.c_str(), t);
      }
    }
  }
}

// Products of three heads: x has 14 elements per head, of which 9 are read, y 10, to 8 of which is added. One of the matrices
// is the same for all heads.
void heads_on_every_isa(int32_t format, bool shared_down) {
  constexpr int32_t H = 3, x_stride = 14, cols = 9, y_stride = 10, rows = 8, rank = 5, T = 6, width = H * x_stride;
  Random random(7);
  const size_t downs = shared_down ? 1 : H, ups = shared_down ? H : 1;
  std::vector<std::vector<float>> a, b;
  for (size_t i = 0; i < downs; ++i) a.push_back(normal(rank * cols, 0.3f, random));
  for (size_t i = 0; i < ups; ++i) b.push_back(normal(rows * rank, 0.3f, random));
  std::vector<std::unique_ptr<Buffer>> keep;
  auto stacked = [&](const std::vector<std::vector<float>>& all, int32_t n, int32_t m) {
    const int64_t bytes = tiled_bytes(n, m, format);
    Buffer& whole = *keep.emplace_back(std::make_unique<Buffer>((size_t)bytes * all.size(), 0));
    for (size_t i = 0; i < all.size(); ++i)
      memcpy(whole.get() + i * (size_t)bytes, tiled(all[i], n, m, format, keep).data, (size_t)bytes);
    return dso_weight{format, n, m, all.size() > 1 ? (int32_t)all.size() : 0, whole.get(), bytes * (int64_t)all.size()};
  };
  const dso_weight down = stacked(a, rank, cols), up = stacked(b, rows, rank);
  const std::vector<float> x = normal(T * width, 1, random);
  const std::vector<int32_t> lengths = {2, 1, 3}, slots = {0, -1, 0}, zeros(3);
  std::vector<float> first;
  for (const Variant& v : variants()) {
    OwnContext context(*v.kernels, 2);
    auto f32 = [](int32_t n) { return dso_slot{DSO_SLOT_F32, n, 0, 0}; };
    const dso_slot slot_list[] = {f32(width), f32(H * y_stride), f32(H * rank), f32(width - H * y_stride), f32(width)};
    std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0}),   step_of(DSO_OP_COLUMNS, {0}, {1}),
                                   step_of(DSO_OP_LORA_DOWN, {0}, {2}), step_of(DSO_OP_LORA_UP, {2, 1}, {1}),
                                   step_of(DSO_OP_COLUMNS, {0}, {3}),   step_of(DSO_OP_CONCAT, {1, 3}, {4}),
                                   step_of(DSO_OP_HIDDEN_OUT, {4}, {})};
    for (int i : {1, 4}) steps[(size_t)i].groups = 1;
    steps[4].offset = H * y_stride;
    for (int i : {2, 3}) {
      steps[(size_t)i].rank = rank;
      steps[(size_t)i].heads = H;
      steps[(size_t)i].head_dim = i == 2 ? x_stride : y_stride;
      steps[(size_t)i].nope = i == 2 ? cols : rows;
    }
    steps[6].flags = DSO_FLAG_LAST;
    dso_plan* plan = nullptr;
    check(dso_plan_create(context.c, steps.data(), 7, slot_list, 5, nullptr, 0, 5, &plan) == 0, "plan: %s", dso_last_error());
    dso_adapters* adapters = nullptr;
    const dso_adapter_site site = {rows, cols, H};
    check(dso_adapters_create(&site, 1, 1, rank, &adapters) == 0, "adapters: %s", dso_last_error());
    check(!adapters->adapts_heads(0), "an empty slot adapts heads");
    check(dso_adapters_set(adapters, 0, 0, &down, &up) == 0, "set: %s", dso_last_error());
    check(adapters->adapts_heads(0), "the slot does not adapt heads");
    std::vector<float> last(x.size(), NAN);
    dso_batch batch{};
    batch.T = T;
    batch.S = 3;
    batch.query_len = lengths.data();
    batch.context_len = batch.phase = zeros.data();
    batch.states = x.data();
    batch.last_hidden = last.data();
    batch.adapter_of = slots.data();
    batch.adapters = adapters;
    check(dso_plan_run(plan, &batch) == 0, "run: %s", dso_last_error());
    for (int32_t t = 0; t < T; ++t)
      for (int32_t c = 0; c < width; ++c) {
        double wanted = x[(size_t)(t * width + c)];
        const int32_t h = c / y_stride, n = c % y_stride;
        if (t != 2 && h < H && n < rows)
          for (int32_t r = 0; r < rank; ++r) {
            double sum = 0;
            for (int32_t k = 0; k < cols; ++k)
              sum += double(x[(size_t)(t * width + h * x_stride + k)]) *
                     stored(a[shared_down ? 0 : (size_t)h][(size_t)(r * cols + k)], format);
            wanted += sum * stored(b[shared_down ? (size_t)h : 0][(size_t)(n * rank + r)], format);
          }
        const float got = last[(size_t)(t * width + c)];
        check(std::abs(got - wanted) <= 1e-5, "%s: row %d, column %d is %g, must be %g", v.name.c_str(), t, c, got, wanted);
      }
    if (first.empty()) first = last;
    check(last == first, "%s: other bits", v.name.c_str());
    refuses(dso_adapters_set(adapters, 0, 0, &up, &down), DSO_EINVAL, "the rank is 8", "swapped");
    check(dso_adapters_set(adapters, 0, 0, nullptr, nullptr) == 0, "clear: %s", dso_last_error());
    check(!adapters->adapts_heads(0), "a cleared slot adapts heads");
    dso_plan_destroy(plan);
    dso_adapters_destroy(adapters);
  }
}

// The parts of a product together fetch each A of the batch's adapters once, and nothing else.
void fetches() {
  Random random(3);
  const dso_adapter_site shapes[] = {{40, 50, 0}, {16, 50, 0}};
  dso_adapters adapters(shapes, 2, 3, 20);
  std::vector<std::unique_ptr<Buffer>> keep;
  std::vector<const uint8_t*> lines;
  for (int32_t slot = 0; slot < 3; ++slot)
    for (int32_t site = 0; site < 2; ++site) {
      if (slot == 2 && site == 0) continue;  // the adapter has nothing for it
      const int32_t rank = 20 - 7 * slot;
      const dso_weight a = tiled(normal((size_t)(rank * 50), 1, random), rank, 50, DSO_BF16, keep);
      const dso_weight b =
          tiled(normal((size_t)(shapes[site].rows * rank), 1, random), shapes[site].rows, rank, DSO_BF16, keep);
      adapters.set(slot, site, &a, &b);
      for (int64_t at = 0; at < a.bytes && slot != 1; at += 64) lines.push_back((const uint8_t*)a.data + at);
    }
  std::sort(lines.begin(), lines.end());
  dso_batch batch{};
  batch.adapters = &adapters;
  const ThreadPlaces places = place_threads({}, 1, true);
  Run run{*variants().front().kernels, places, 1, {}, {}};
  run.batch.source = &batch;
  run.batch.adapted = {{0, 0, 32}, {0, 32, 5}, {2, 40, 1}};
  for (int64_t parts : {1, 3, 100}) {
    std::vector<const uint8_t*> fetched;
    for (int64_t part = 0; part < parts; ++part) {
      const DownFetches fetches(run, {0, 1}, part, parts);
      const Matrix w = fetches.beside({});
      for (const Fetch* f = w.next; f != w.next_end; ++f)
        for (int64_t at = 0; at < f->bytes; at += 64) fetched.push_back(f->data + at);
    }
    std::sort(fetched.begin(), fetched.end());
    check(fetched == lines, "%d parts fetch %zu lines, not these %zu", (int)parts, fetched.size(), lines.size());
  }
}

void refused() {
  Random random(1);
  const Sizes s{20, 12, 8};
  const Pair pair{8, normal(8 * 20, 1, random), normal(12 * 8, 1, random)};
  Adapted adapted(s, {pair}, DSO_F32, *variants().front().kernels, 1);
  const std::vector<float> x = normal(2 * 20, 1, random);
  std::vector<std::unique_ptr<Buffer>> keep;
  const dso_weight a = tiled(pair.a, 8, 20, DSO_F32, keep), b = tiled(pair.b, 12, 8, DSO_F32, keep);
  adapted.run(x, {1, 1}, {0, 2}, DSO_EINVAL);
  check(strstr(dso_last_error(), "adapter_of[1] is 2"), "got: %s", dso_last_error());
  refuses(dso_adapters_set(adapted.adapters, 2, 0, &a, &b), DSO_EINVAL, "slot is 2", "slot");
  refuses(dso_adapters_set(adapted.adapters, 0, 1, &a, &b), DSO_EINVAL, "site is 1", "site");
  refuses(dso_adapters_set(adapted.adapters, 0, 0, &a, nullptr), DSO_EINVAL, "only one", "one matrix");
  refuses(dso_adapters_set(adapted.adapters, 0, 0, &b, &a), DSO_EINVAL, "the rank is 12", "swapped");
  dso_weight wrong = a;
  wrong.bytes -= 4;
  refuses(dso_adapters_set(adapted.adapters, 0, 0, &wrong, &b), DSO_EINVAL, "bytes", "too short");
  wrong = a;
  wrong.format = DSO_INT8;
  refuses(dso_adapters_set(adapted.adapters, 0, 0, &wrong, &b), DSO_EINVAL, "format", "format");
  check(dso_adapters_set(adapted.adapters, 0, 0, nullptr, nullptr) == 0, "clear: %s", dso_last_error());
  check(adapted.run(x, {1, 1}, {0, 1}) == x, "rows changed though both slots are empty");
  dso_adapters* other = nullptr;
  const dso_adapter_site site = {12, 19, 0};
  check(dso_adapters_create(&site, 1, 1, 8, &other) == 0, "adapters: %s", dso_last_error());
  std::swap(other, adapted.adapters);
  adapted.run(x, {1, 1}, {0, 0}, DSO_EINVAL);
  check(strstr(dso_last_error(), "site 0 has another shape"), "got: %s", dso_last_error());
  std::swap(other, adapted.adapters);
  dso_adapters_destroy(other);
  refuses(dso_adapters_create(&site, 1, 0, 8, &other), DSO_EINVAL, "slots is 0", "no slots");
}

// A result of LORA_DOWN that is not as precise as the rows, or more precise.
void refused_kinds() {
  OwnContext context(*variants().front().kernels, 1);
  for (int32_t kind : {DSO_SLOT_F32, DSO_SLOT_BF16, DSO_SLOT_Q8, DSO_SLOT_Q16}) {
    const int32_t other = low_rank_kind(kind) == DSO_SLOT_F32 ? DSO_SLOT_BF16 : DSO_SLOT_F32;
    const dso_slot slots[] = {{DSO_SLOT_F32, 32, 0, 0}, {kind, 32, 0, 0}, {other, 8, 0, 0}};
    const bool plain = kind == DSO_SLOT_F32;
    std::vector<dso_step> steps = {step_of(DSO_OP_STATE_IN, {}, {0}), step_of(DSO_OP_LORA_DOWN, {plain ? 0 : 1}, {2})};
    if (!plain) steps.insert(steps.begin() + 1, step_of(DSO_OP_CONVERT, {0}, {1}));
    steps.back().rank = 8;
    dso_plan* plan = nullptr;
    refuses(dso_plan_create(context.c, steps.data(), (int32_t)steps.size(), slots, 3, nullptr, 0, 32, &plan), DSO_EINVAL,
            "out[0] is", "kind of the result");
  }
}

}  // namespace

int main() {
  for (int32_t format : {DSO_F32, DSO_BF16})
    for (int32_t kind : {DSO_SLOT_F32, DSO_SLOT_BF16, DSO_SLOT_Q8, DSO_SLOT_Q16})
      for (const Sizes& s : {Sizes{50, 33, 5}, Sizes{321, 290, 40}, Sizes{64, 16, 16}}) on_every_isa(s, kind, format);
  for (int32_t format : {DSO_F32, DSO_BF16})
    for (bool shared_down : {false, true}) heads_on_every_isa(format, shared_down);
  fetches();
  refused();
  refused_kinds();
  return report("test_lora");
}
