// Attention outside a plan: one task per sequence and q head.
#include "../kernels/train_attention.hpp"
#include "check_arguments.hpp"
#include "dso.h"
#include "layout.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kMost = int64_t(1) << 31;  // of any size

int64_t size_of(int32_t type) { return type == DSO_TYPE_BF16 ? 2 : 4; }

template <class Pointer>
Pointer at(const dso_dense_heads& h, int64_t size, int64_t batch, int64_t head) {
  return static_cast<uint8_t*>(h.data) + (h.batch * batch + h.head * head) * size;
}

DenseAttnTask task_of(const dso_dense_attention& a, int64_t batch, int64_t head) {
  const int64_t size = size_of(a.type), mask_size = a.mask_type == DSO_MASK_BYTES ? 1 : size;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  DenseAttnTask t{};
  t.type = a.type, t.mask_type = a.mask_type, t.scale = a.scale, t.rounded = a.rounded;
  t.queries = a.queries, t.keys = a.keys, t.qk_width = a.qk_width, t.v_width = a.v_width;
  t.q = at<const void*>(a.q, size, batch, head), t.o = at<void*>(a.o, size, batch, head);
  t.k = at<const void*>(a.k, size, batch, kv_head), t.v = at<const void*>(a.v, size, batch, kv_head);
  if (a.mask_type == DSO_MASK_BYTES || a.mask_type == DSO_MASK_NUMBERS)
    t.mask = at<const void*>(a.mask, mask_size, batch, head);
  t.q_token = a.q.token, t.k_token = a.k.token, t.v_token = a.v.token, t.o_token = a.o.token, t.mask_query = a.mask.token;
  return t;
}

void check(const dso_dense_heads& h, const char* name) {
  if (!h.data) fail(DSO_EINVAL, "%s.data is NULL", name);
}

void check(int64_t n, const char* name) {
  if (n < 0 || n > kMost) fail(DSO_EINVAL, "%s is %lld, must be from 0 to %lld", name, (long long)n, (long long)kMost);
}

const dso_dense_attention& checked(const dso_dense_attention* given_one) {
  const dso_dense_attention& a = given(given_one, "attention");
  if (a.type != DSO_TYPE_F32 && a.type != DSO_TYPE_BF16) fail(DSO_EINVAL, "unknown type %d", a.type);
  if (a.mask_type < DSO_MASK_NONE || a.mask_type > DSO_MASK_CAUSAL) fail(DSO_EINVAL, "unknown mask_type %d", a.mask_type);
  check(a.batch, "batch"), check(a.queries, "queries"), check(a.keys, "keys"), check(a.qk_width, "qk_width");
  check(a.v_width, "v_width"), check(a.heads, "heads"), check(a.kv_heads, "kv_heads");
  if (a.kv_heads < 1 || a.heads % a.kv_heads)
    fail(DSO_EINVAL, "%lld heads cannot share %lld kv heads: heads must be a multiple", (long long)a.heads,
         (long long)a.kv_heads);
  if (a.mask_type == DSO_MASK_CAUSAL && a.keys < a.queries)
    fail(DSO_EINVAL, "a causal mask needs at least as many keys as queries, got %lld and %lld", (long long)a.keys,
         (long long)a.queries);
  if (!a.batch || !a.heads || !a.queries || !a.v_width) return a;  // nothing is written
  check(a.q, "q"), check(a.o, "o");
  if (a.keys) check(a.k, "k"), check(a.v, "v");
  if (a.keys && (a.mask_type == DSO_MASK_BYTES || a.mask_type == DSO_MASK_NUMBERS)) check(a.mask, "mask");
  return a;
}

void attend(Context& c, const dso_dense_attention& a) {
  if (!a.batch || !a.heads || !a.queries || !a.v_width) return;
  const TrainAttention& kernels = *c.kernels.train_attention;
  const int64_t scratch = round_up(kernels.dense_scratch(task_of(a, 0, 0)), 4096);
  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  c.scratch.reserve(scratch * team.threads());
  Stages stages({{a.batch * a.heads, [&](int64_t i, int thread) {
                    kernels.dense(task_of(a, i / a.heads, i % a.heads), c.scratch.data() + thread * scratch);
                  }}});
  team.run(stages);
}

}  // namespace
}  // namespace dso

extern "C" int32_t dso_attend(dso_context* c, const dso_dense_attention* a) {
  return dso::guarded([&] { dso::attend(dso::shared(c), dso::checked(a)); });
}
