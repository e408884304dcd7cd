// Training: splits the optimizer and gradient norms, for many tensors per call, into tasks, and implements their C interface.
#include <algorithm>
#include <vector>

#include "../kernels/train_elementwise.hpp"
#include "check_arguments.hpp"
#include "dso_train.h"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kPiece = 16384;  // elements per task: a multiple of 256, the block size of 8-bit moments

// Many tensors as one list of tasks: task i is elements [begin, end) of a tensor.
class Pieces {
 public:
  template <class T>
  Pieces(const T* tensors, int64_t count) : ends_(size_t(count)) {
    int64_t tasks = 0;
    for (int64_t i = 0; i < count; ++i) ends_[size_t(i)] = tasks += (tensors[i].count + kPiece - 1) / kPiece;
  }
  int64_t tasks() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t first(int64_t tensor) const { return tensor == 0 ? 0 : ends_[size_t(tensor) - 1]; }
  int64_t end(int64_t tensor) const { return ends_[size_t(tensor)]; }
  int64_t tensor_of(int64_t task) const { return std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin(); }

 private:
  std::vector<int64_t> ends_;
};

void check_type(int32_t type, const char* name) {
  if (type != DSO_TYPE_F32 && type != DSO_TYPE_BF16) fail(DSO_EINVAL, "%s is %d, must be a DSO_TYPE_*", name, type);
}

void check_update(const dso_train_update& u, int64_t i) {
  const auto need = [i](const void* p, const char* name) {
    if (!p) fail(DSO_EINVAL, "update %lld: %s is NULL", (long long)i, name);
  };
  if (u.count < 0) fail(DSO_EINVAL, "update %lld: count is %lld, must not be negative", (long long)i, (long long)u.count);
  if (u.master < DSO_MASTER_NONE || u.master > DSO_MASTER_STOCHASTIC)
    fail(DSO_EINVAL, "update %lld: master is %d, must be a DSO_MASTER_*", (long long)i, u.master);
  if (u.moments < DSO_MOMENTS_F32 || u.moments > DSO_MOMENTS_INT8)
    fail(DSO_EINVAL, "update %lld: moments is %d, must be a DSO_MOMENTS_*", (long long)i, u.moments);
  check_type(u.gradient_type, "gradient_type");
  if (u.count == 0) return;
  need(u.parameter, "parameter");
  need(u.gradient, "gradient");
  need(u.m, "m");
  need(u.v, "v");
  if (u.master == DSO_MASTER_SPLIT) need(u.low, "low");
  if (u.moments == DSO_MOMENTS_INT8) need(u.m_scale, "m_scale"), need(u.v_scale, "v_scale");
}

void adamw(Context& c, const dso_train_update* updates, int64_t count) {
  for (int64_t i = 0; i < count; ++i) check_update(updates[i], i);
  const Pieces pieces(updates, count);
  if (pieces.tasks() == 0) return;
  parallel(c, pieces.tasks(), [&](int64_t task, int) {
    const int64_t i = pieces.tensor_of(task), begin = (task - pieces.first(i)) * kPiece;
    c.kernels.train_elementwise->adamw(updates[i], begin, std::min(begin + kPiece, updates[i].count));
  });
}

void squares(Context& c, const dso_train_numbers* tensors, int64_t count, double* sums, int64_t* not_finite) {
  for (int64_t i = 0; i < count; ++i) {
    check_type(tensors[i].type, "type");
    if (tensors[i].count < 0)
      fail(DSO_EINVAL, "tensor %lld: count is %lld, must not be negative", (long long)i, (long long)tensors[i].count);
    if (tensors[i].count && !tensors[i].data) fail(DSO_EINVAL, "tensor %lld: data is NULL", (long long)i);
  }
  const Pieces pieces(tensors, count);
  struct Part {
    double sum;
    int64_t not_finite;
  };
  std::vector<Part> parts(size_t(pieces.tasks()));
  if (pieces.tasks())
    parallel(c, pieces.tasks(), [&](int64_t task, int) {
      const int64_t i = pieces.tensor_of(task), begin = (task - pieces.first(i)) * kPiece;
      Part& part = parts[size_t(task)];
      c.kernels.train_elementwise->squares(tensors[i].type, tensors[i].data, begin, std::min(begin + kPiece, tensors[i].count),
                                           &part.sum, &part.not_finite);
    });
  for (int64_t i = 0; i < count; ++i) {
    sums[i] = 0;
    not_finite[i] = 0;
    for (int64_t task = pieces.first(i); task < pieces.end(i); ++task) {
      sums[i] += parts[size_t(task)].sum;
      not_finite[i] += parts[size_t(task)].not_finite;
    }
  }
}

void check_numbers(const dso_train_numbers& x, const char* name) {
  check_type(x.type, name);
  if (x.count < 0) fail(DSO_EINVAL, "%s: count is %lld, must not be negative", name, (long long)x.count);
  if (x.count && !x.data) fail(DSO_EINVAL, "%s: data is NULL", name);
}

}  // namespace
}  // namespace dso

using namespace dso;

extern "C" {

int32_t dso_train_adamw(dso_context* c, const dso_train_update* updates, int64_t updates_count) {
  return guarded([&] {
    if (updates_count < 0) fail(DSO_EINVAL, "updates_count is %lld, must not be negative", (long long)updates_count);
    if (updates_count) adamw(shared(c), &given(updates, "updates"), updates_count);
  });
}

int32_t dso_train_squares(dso_context* c, const dso_train_numbers* tensors, int64_t tensors_count, double* sums,
                          int64_t* not_finite) {
  return guarded([&] {
    if (tensors_count < 0) fail(DSO_EINVAL, "tensors_count is %lld, must not be negative", (long long)tensors_count);
    if (tensors_count)
      squares(shared(c), &given(tensors, "tensors"), tensors_count, &given(sums, "sums"), &given(not_finite, "not_finite"));
  });
}

int32_t dso_train_scale(dso_context* c, const dso_train_numbers* x, float scale, int32_t adds,
                        const dso_train_numbers* result) {
  return guarded([&] {
    check_numbers(given(x, "x"), "x");
    check_numbers(given(result, "result"), "result");
    if (x->count != result->count)
      fail(DSO_EINVAL, "x has %lld elements, but result has %lld", (long long)x->count, (long long)result->count);
    const Pieces pieces(x, 1);
    if (pieces.tasks() == 0) return;
    parallel(shared(c), pieces.tasks(), [&](int64_t task, int) {
      const int64_t begin = task * kPiece;
      shared(c).kernels.train_elementwise->scale(x->type, x->data, scale, adds != 0, begin, std::min(begin + kPiece, x->count),
                                                 result->type, const_cast<void*>(result->data));
    });
  });
}

}  // extern "C"
