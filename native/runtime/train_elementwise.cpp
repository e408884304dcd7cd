// Training: splits row-wise ops and the loss into tasks, and implements their C interface.
#include "../kernels/train_elementwise.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "check_arguments.hpp"
#include "dso_train.h"
#include "layout.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kTaskNumbers = 16384;                    // elements per task, approximately
constexpr int64_t kMostPieces = 64, kLeastPieceRows = 16;  // chunks of rows whose weight gradients are summed separately
constexpr int64_t kMostSide = int64_t(1) << 40;            // no product of sizes overflows

void check_shape(int64_t rows, int64_t n) {
  if (rows < 0 || n < 0 || rows > kMostSide || n > kMostSide)
    fail(DSO_EINVAL, "invalid shape: %lld rows of %lld", (long long)rows, (long long)n);
}

void check_type(int32_t type, const char* name) {
  if (type != DSO_TYPE_F32 && type != DSO_TYPE_BF16) fail(DSO_EINVAL, "%s.type is %d, which is unknown", name, type);
}

void need(const void* p, const char* name) {
  if (!p) fail(DSO_EINVAL, "%s is NULL", name);
}

// The rows of an operand; all operands of a call have one type.
class Rows {
 public:
  Rows(const dso_train_matrix* m, const char* name, int64_t rows, int64_t n, int32_t type) {
    given(m, name);
    check_type(m->type, name);
    if (m->type != type) fail(DSO_EINVAL, "%s must have the type of the first operand", name);
    if (rows > 1 && m->ld < n)
      fail(DSO_EINVAL, "%s.ld is %lld, but a row has %lld elements", name, (long long)m->ld, (long long)n);
    if (rows > 0 && n > 0 && !m->data) fail(DSO_EINVAL, "%s.data is NULL", name);
    data_ = static_cast<uint8_t*>(m->data);
    stride_ = m->ld * (type == DSO_TYPE_BF16 ? 2 : 4);
  }
  Rows() = default;  // an absent operand
  void* operator[](int64_t row) const { return data_ ? data_ + row * stride_ : nullptr; }

 private:
  uint8_t* data_ = nullptr;
  int64_t stride_ = 0;
};

template <class Row>
void each_row(Context& c, int64_t rows, int64_t n, const Row& row) {
  if (rows == 0) return;
  const int64_t block = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, n));
  parallel(c, ceil_div(rows, block), [&](int64_t task, int) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) row(r);
  });
}

void rms_norm_backward(Context& c, int64_t rows, int64_t n, int32_t type, const Rows& dy, const Rows& x, const void* weight,
                       const float* rstd, const Rows& dx, float* dw) {
  const TrainElementwise& kernels = *c.kernels.train_elementwise;
  if (!dw || rows == 0) {
    if (dw) std::fill(dw, dw + n, 0.0f);
    return each_row(c, rows, n,
                    [&](int64_t r) { kernels.rms_norm_backward(type, dy[r], x[r], weight, rstd[r], n, dx[r], nullptr); });
  }
  const int64_t block = std::max(kLeastPieceRows, ceil_div(rows, kMostPieces)), pieces = ceil_div(rows, block);
  ThreadPool::Lease lease(c.pool);
  const int64_t piece_floats = round_up(n, 16);  // no two threads write to the same cache line
  c.scratch.reserve(pieces * piece_floats * 4);
  float* const sums = reinterpret_cast<float*>(c.scratch.data());
  Stages stages({{pieces,
                  [&](int64_t piece, int) {
                    float* const mine = sums + piece * piece_floats;
                    std::fill(mine, mine + n, 0.0f);
                    for (int64_t r = piece * block; r < std::min(rows, (piece + 1) * block); ++r)
                      kernels.rms_norm_backward(type, dy[r], x[r], weight, rstd[r], n, dx[r], mine);
                  }},
                 {1, [&](int64_t, int) {
                    std::fill(dw, dw + n, 0.0f);
                    for (int64_t piece = 0; piece < pieces; ++piece)
                      for (int64_t i = 0; i < n; ++i) dw[i] += sums[piece * piece_floats + i];
                  }}});
  lease.team().run(stages);
}

void check_rotation(const dso_train_rotation& r) {
  check_type(r.type, "rotation");
  for (int64_t size : {r.batch, r.tokens, r.heads, r.head_dim, r.half})
    if (size < 0 || size > kMostSide) fail(DSO_EINVAL, "rotation: a size is %lld, out of range", (long long)size);
  if (2 * r.half > r.head_dim)
    fail(DSO_EINVAL, "rotation: half is %lld, must be from 0 to half of head_dim, %lld", (long long)r.half,
         (long long)r.head_dim);
}

void rope(Context& c, const dso_train_rotation& r, const void* x, const void* cosine, const void* sine, void* result) {
  const int64_t size = r.type == DSO_TYPE_BF16 ? 2 : 4;
  const auto at = [size](const void* p, int64_t elements) {
    return static_cast<uint8_t*>(const_cast<void*>(p)) + elements * size;
  };
  each_row(c, r.batch * r.tokens, r.heads * r.head_dim, [&](int64_t row) {
    const int64_t b = row / r.tokens, t = row % r.tokens, angle = b * r.angle_batch + t * r.angle_token;
    c.kernels.train_elementwise->rope(r, at(x, b * r.x_batch + t * r.x_token), at(cosine, angle), at(sine, angle),
                                      at(result, b * r.out_batch + t * r.out_token));
  });
}

void cross_entropy(Context& c, int64_t rows, int64_t n, int32_t type, const Rows& logits, const int64_t* labels,
                   int64_t ignored, float factor, int32_t gradient, double* losses) {
  for (int64_t r = 0; r < rows; ++r)
    if (labels[r] != ignored && (labels[r] < 0 || labels[r] >= n))
      fail(DSO_EINVAL, "labels[%lld] is %lld, but a row has %lld logits", (long long)r, (long long)labels[r], (long long)n);
  each_row(c, rows, n, [&](int64_t r) {
    if (labels[r] == ignored) {
      losses[r] = 0;
      uint8_t* const row = static_cast<uint8_t*>(logits[r]);
      if (gradient >= 0) std::fill(row, row + n * (gradient == DSO_TYPE_BF16 ? 2 : 4), uint8_t(0));
    } else {
      losses[r] = c.kernels.train_elementwise->cross_entropy(type, logits[r], n, labels[r], factor, gradient);
    }
  });
}

// Each task owns some rows of the result and finds the matching rows of x in the sorted list of (number, row).
void rows_summed(Context& c, int64_t rows, int64_t n, const dso_train_matrix& x, const int64_t* numbers, int64_t ignored,
                 int64_t result_rows, const dso_train_matrix& result, bool adds) {
  std::vector<std::pair<int64_t, int64_t>> order;
  order.reserve(size_t(rows));
  for (int64_t r = 0; r < rows; ++r) {
    if (numbers[r] == ignored) continue;
    if (numbers[r] < 0 || numbers[r] >= result_rows)
      fail(DSO_EINVAL, "numbers[%lld] is %lld, but result has %lld rows", (long long)r, (long long)numbers[r],
           (long long)result_rows);
    order.emplace_back(numbers[r], r);
  }
  std::sort(order.begin(), order.end());
  std::vector<int64_t> which(order.size());
  for (size_t i = 0; i < order.size(); ++i) which[i] = order[i].second;
  const int64_t size = result.type == DSO_TYPE_BF16 ? 2 : 4,
                block = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, n));
  parallel(c, ceil_div(result_rows, block), [&](int64_t task, int) {
    const int64_t end = std::min(result_rows, (task + 1) * block);
    size_t at = size_t(std::lower_bound(order.begin(), order.end(), std::make_pair(task * block, int64_t(0))) - order.begin());
    for (int64_t v = task * block; v < end; ++v) {
      const size_t first = at;
      while (at < order.size() && order[at].first == v) ++at;
      uint8_t* const out = static_cast<uint8_t*>(result.data) + v * result.ld * size;
      if (at > first) {
        c.kernels.train_elementwise->rows_summed(x.type, x.data, x.ld, which.data() + first, int64_t(at - first), n, adds,
                                                 result.type, out);
      } else if (!adds) {
        std::memset(out, 0, size_t(n * size));
      }
    }
  });
}

}  // namespace
}  // namespace dso

using namespace dso;

extern "C" {

int32_t dso_train_rms_norm(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* x, const void* weight, float eps,
                           const dso_train_matrix* y, float* rstd) {
  return guarded([&] {
    check_shape(rows, n);
    const int32_t type = given(x, "x").type;
    const Rows from(x, "x", rows, n, type), to(y, "y", rows, n, type);
    if (rows > 0 && n > 0) need(weight, "weight"), need(rstd, "rstd");
    each_row(shared(c), rows, n,
             [&](int64_t r) { shared(c).kernels.train_elementwise->rms_norm(type, from[r], weight, n, eps, to[r], rstd + r); });
  });
}

int32_t dso_train_rms_norm_backward(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* dy,
                                    const dso_train_matrix* x, const void* weight, const float* rstd,
                                    const dso_train_matrix* dx, float* dw) {
  return guarded([&] {
    check_shape(rows, n);
    const int32_t type = given(dy, "dy").type;
    if (rows > 0 && n > 0) need(weight, "weight"), need(rstd, "rstd");
    rms_norm_backward(shared(c), rows, n, type, {dy, "dy", rows, n, type}, {x, "x", rows, n, type}, weight, rstd,
                      {dx, "dx", rows, n, type}, dw);
  });
}

int32_t dso_train_swiglu(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* gate, const dso_train_matrix* up,
                         const dso_train_matrix* h) {
  return guarded([&] {
    check_shape(rows, n);
    const int32_t type = given(gate, "gate").type;
    const Rows g(gate, "gate", rows, n, type), u(up, "up", rows, n, type), to(h, "h", rows, n, type);
    each_row(shared(c), rows, n, [&](int64_t r) { shared(c).kernels.train_elementwise->swiglu(type, g[r], u[r], n, to[r]); });
  });
}

int32_t dso_train_swiglu_backward(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* gate,
                                  const dso_train_matrix* up, const dso_train_matrix* dh, const dso_train_matrix* dgate,
                                  const dso_train_matrix* dup, const dso_train_matrix* h) {
  return guarded([&] {
    check_shape(rows, n);
    const int32_t type = given(gate, "gate").type;
    const Rows g(gate, "gate", rows, n, type), u(up, "up", rows, n, type), d(dh, "dh", rows, n, type);
    const Rows dg(dgate, "dgate", rows, n, type), du(dup, "dup", rows, n, type), to = h ? Rows(h, "h", rows, n, type) : Rows();
    each_row(shared(c), rows, n, [&](int64_t r) {
      shared(c).kernels.train_elementwise->swiglu_backward(type, g[r], u[r], d[r], n, dg[r], du[r], to[r]);
    });
  });
}

int32_t dso_train_rope(dso_context* c, const dso_train_rotation* rotation, const void* x, const void* cosine, const void* sine,
                       void* result) {
  return guarded([&] {
    const dso_train_rotation& r = given(rotation, "rotation");
    check_rotation(r);
    if (r.batch == 0 || r.tokens == 0 || r.heads == 0 || r.head_dim == 0) return;
    need(x, "x"), need(result, "result");
    if (r.half > 0) need(cosine, "cosine"), need(sine, "sine");
    if (r.interleaved && x == result) fail(DSO_EINVAL, "result must not be x with interleaving");
    rope(shared(c), r, x, cosine, sine, result);
  });
}

int32_t dso_train_rows_summed(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* x, const int64_t* numbers,
                              int64_t ignored, int64_t result_rows, const dso_train_matrix* result, int32_t adds) {
  return guarded([&] {
    check_shape(rows, n);
    check_shape(result_rows, n);
    Rows(x, "x", rows, n, given(x, "x").type);
    Rows(result, "result", result_rows, n, given(result, "result").type);
    if (result_rows == 0 || n == 0) return;
    if (rows > 0) need(numbers, "numbers");
    rows_summed(shared(c), rows, n, *x, numbers, ignored, result_rows, *result, adds != 0);
  });
}

int32_t dso_train_cross_entropy(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* logits, const int64_t* labels,
                                int64_t ignored, float factor, int32_t gradient, double* losses) {
  return guarded([&] {
    check_shape(rows, n);
    const int32_t type = given(logits, "logits").type;
    if (gradient != -1 && gradient != DSO_TYPE_BF16 && (gradient != DSO_TYPE_F32 || type == DSO_TYPE_BF16))
      fail(DSO_EINVAL, "gradient is %d, which does not fit logits of type %d", gradient, type);
    const Rows x(logits, "logits", rows, n, type);
    if (rows == 0) return;
    cross_entropy(shared(c), rows, n, type, x, &given(labels, "labels"), ignored, factor, gradient, &given(losses, "losses"));
  });
}

}  // extern "C"
