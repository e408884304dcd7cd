// Training: splits matrix products into tasks, and implements their C interface.
#include "train_product.hpp"

#include <algorithm>
#include <limits>

#include "check_arguments.hpp"
#include "dso_train.h"
#include "layout.hpp"
#include "parallel.hpp"

namespace dso {
namespace {

constexpr int64_t kMostRows = 384, kMostColumns = 768;  // per block: its packed rows stay in L2
constexpr int64_t kPackCost = 20;  // cost of packing an element, in multiplied elements (sampled on Zen 4; affects only speed)
constexpr int64_t kColumnsOfSums = 256;

constexpr int64_t kMostSide = int64_t(1) << 40;  // no product of sizes below it overflows

}  // namespace

// Estimated time: that of a block times the number of blocks of the busiest thread; the smallest product is chosen.
ProductGrid cut_product(int64_t M, int64_t N, int64_t jobs, int threads) {
  ProductGrid best{product_rows, product_columns};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t rows = product_rows; rows <= std::min(kMostRows, round_up(M, product_rows)); rows += product_rows)
    for (int64_t columns = product_columns; columns <= std::min(kMostColumns, round_up(N, product_columns));
         columns += product_columns) {
      const int64_t tasks = jobs * ceil_div(M, rows) * ceil_div(N, columns);
      const int64_t m = std::min(rows, M), n = std::min(columns, N);
      const int64_t cost = ceil_div(tasks, int64_t(threads)) * (m * n + kPackCost * (m + n));
      if (cost < least) least = cost, best = {rows, columns};
    }
  return best;
}

void multiply(Context& c, const std::vector<ProductJob>& jobs, bool exact) {
  int64_t M = 0, N = 0;
  for (const ProductJob& job : jobs) M = std::max(M, job.M), N = std::max(N, job.N);
  if (M == 0 || N == 0) return;
  const ProductGrid grid = cut_product(M, N, int64_t(jobs.size()), c.pool.threads());
  std::vector<int64_t> first(1, 0);  // tasks before each job
  for (const ProductJob& job : jobs) first.push_back(first.back() + ceil_div(job.M, grid.rows) * ceil_div(job.N, grid.columns));

  const TrainProduct& kernels = *c.kernels.train_product;
  int64_t scratch = 0;
  for (const ProductJob& job : jobs)
    scratch = std::max(scratch, kernels.scratch(std::min(grid.rows, M), std::min(grid.columns, N), job.K));
  scratch = round_up(scratch, 4096);
  ThreadPool::Lease lease(c.pool);
  Team& team = lease.team();
  c.scratch.reserve(scratch * team.threads());
  uint8_t* const memory = c.scratch.data();
  Stages stages({{first.back(), [&](int64_t index, int thread) {
                    const size_t at = size_t(std::upper_bound(first.begin(), first.end(), index) - first.begin()) - 1;
                    const ProductJob& job = jobs[at];
                    const int64_t row_blocks = ceil_div(job.M, grid.rows), task = index - first[at];
                    // Row blocks first: the threads share the columns, mostly weights, that one of them fetched.
                    const int64_t m = task % row_blocks * grid.rows, n = task / row_blocks * grid.columns;
                    kernels.block(job, exact, m, std::min(m + grid.rows, job.M), n, std::min(n + grid.columns, job.N),
                                  memory + thread * scratch);
                  }}});
  team.run(stages);
}

namespace {

const dso_train_matrix& checked(const dso_train_matrix* m, const char* name, int64_t rows, int64_t columns,
                                int64_t groups = 1) {
  given(m, name);
  if (m->type != DSO_TYPE_F32 && m->type != DSO_TYPE_BF16) fail(DSO_EINVAL, "%s.type is %d, which is unknown", name, m->type);
  if (rows < 0 || columns < 0 || rows > kMostSide || columns > kMostSide)
    fail(DSO_EINVAL, "%s has invalid shape %lld x %lld", name, (long long)rows, (long long)columns);
  if (m->ld < columns && rows > 1)
    fail(DSO_EINVAL, "%s.ld is %lld, but a row has %lld elements", name, (long long)m->ld, (long long)columns);
  if (groups > 1 && m->next < 0) fail(DSO_EINVAL, "%s.next is %lld, must not be negative", name, (long long)m->next);
  if (rows > 0 && columns > 0 && groups > 0 && !m->data) fail(DSO_EINVAL, "%s.data is NULL", name);
  return *m;
}

int64_t size_of(const dso_train_matrix& m) { return m.type == DSO_TYPE_BF16 ? 2 : 4; }

ProductOperand operand(const dso_train_matrix& m, bool along) {
  return {static_cast<const uint8_t*>(m.data), m.ld, m.type == DSO_TYPE_BF16, along};
}

void check_form(int32_t form, int32_t flags) {
  if (form != DSO_PRODUCT_NT && form != DSO_PRODUCT_NN && form != DSO_PRODUCT_TN) fail(DSO_EINVAL, "unknown form %d", form);
  if (flags & ~(DSO_PRODUCT_ADD | DSO_PRODUCT_EXACT)) fail(DSO_EINVAL, "unknown flags %d", flags);
}

ProductJob job_of(int32_t form, int32_t flags, int64_t M, int64_t N, int64_t K, const dso_train_matrix* a,
                  const dso_train_matrix* b, const dso_train_matrix* bias, const dso_train_matrix* result, int64_t groups = 1) {
  const bool tn = form == DSO_PRODUCT_TN, nt = form == DSO_PRODUCT_NT;
  const dso_train_matrix& left = tn ? checked(a, "a", K, M) : checked(a, "a", M, K);
  const dso_train_matrix& right = nt ? checked(b, "b", N, K, tn ? 1 : groups) : checked(b, "b", K, N, tn ? 1 : groups);
  const dso_train_matrix& to = checked(result, "result", M, N, tn ? groups : 1);
  if (bias) checked(bias, "bias", 1, N);
  return {M,
          N,
          K,
          operand(left, !tn),
          operand(right, nt),
          {static_cast<uint8_t*>(to.data), to.ld, to.type == DSO_TYPE_BF16, (flags & DSO_PRODUCT_ADD) != 0,
           bias ? static_cast<const uint8_t*>(bias->data) : nullptr, bias && bias->type == DSO_TYPE_BF16}};
}

std::vector<ProductJob> jobs_of_groups(int32_t form, int32_t flags, int32_t groups, const int64_t* offsets, int64_t M,
                                       int64_t N, int64_t K, const dso_train_matrix* a, const dso_train_matrix* b,
                                       const dso_train_matrix* result) {
  if (groups < 0) fail(DSO_EINVAL, "groups is %d, must not be negative", groups);
  given(offsets, "offsets");
  const bool tn = form == DSO_PRODUCT_TN;
  for (int32_t g = 0; g < groups; ++g)
    if (offsets[g] < 0 || offsets[g + 1] < offsets[g])
      fail(DSO_EINVAL, "offsets[%d] is %lld, must be at least %lld", g + 1, (long long)offsets[g + 1], (long long)offsets[g]);
  const int64_t rows = groups ? offsets[groups] : 0;
  const ProductJob whole = job_of(form, flags, tn ? M : rows, N, tn ? rows : K, a, b, nullptr, result, groups);
  std::vector<ProductJob> jobs;
  for (int32_t g = 0; g < groups; ++g) {
    ProductJob job = whole;
    (tn ? job.K : job.M) = offsets[g + 1] - offsets[g];
    job.a.data += offsets[g] * a->ld * size_of(*a);
    job.b.data += (tn ? offsets[g] * b->ld : g * b->next) * size_of(*b);
    job.c.data += (tn ? g * result->next : offsets[g] * result->ld) * size_of(*result);
    if (job.M > 0) jobs.push_back(job);
  }
  return jobs;
}

void sum_columns(Context& c, int32_t flags, int64_t T, int64_t N, const dso_train_matrix* x, const dso_train_matrix* sums) {
  if (flags & ~DSO_PRODUCT_ADD) fail(DSO_EINVAL, "unknown flags %d", flags);
  const dso_train_matrix &from = checked(x, "x", T, N), &to = checked(sums, "sums", 1, N);
  parallel(c, ceil_div(N, kColumnsOfSums), [&](int64_t block, int) {
    const int64_t begin = block * kColumnsOfSums, end = std::min(begin + kColumnsOfSums, N);
    c.kernels.train_product->column_sums(operand(from, false), T, begin, end, static_cast<uint8_t*>(to.data),
                                         to.type == DSO_TYPE_BF16, (flags & DSO_PRODUCT_ADD) != 0);
  });
}

}  // namespace
}  // namespace dso

using namespace dso;

extern "C" {

int32_t dso_train_product(dso_context* c, int32_t form, int32_t flags, int64_t M, int64_t N, int64_t K,
                          const dso_train_matrix* a, const dso_train_matrix* b, const dso_train_matrix* bias,
                          const dso_train_matrix* result) {
  return guarded([&] {
    Context& context = shared(c);
    check_form(form, flags);
    multiply(context, {job_of(form, flags, M, N, K, a, b, bias, result)}, (flags & DSO_PRODUCT_EXACT) != 0);
  });
}

int32_t dso_train_grouped_product(dso_context* c, int32_t form, int32_t flags, int32_t groups, const int64_t* offsets,
                                  int64_t M, int64_t N, int64_t K, const dso_train_matrix* a, const dso_train_matrix* b,
                                  const dso_train_matrix* result) {
  return guarded([&] {
    Context& context = shared(c);
    check_form(form, flags);
    multiply(context, jobs_of_groups(form, flags, groups, offsets, M, N, K, a, b, result), (flags & DSO_PRODUCT_EXACT) != 0);
  });
}

int32_t dso_train_column_sums(dso_context* c, int32_t flags, int64_t T, int64_t N, const dso_train_matrix* x,
                              const dso_train_matrix* sums) {
  return guarded([&] { sum_columns(shared(c), flags, T, N, x, sums); });
}

}  // extern "C"
