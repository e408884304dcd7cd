// Splits the products of training into tasks.
#pragma once
#include <cstdint>
#include <vector>

#include "../kernels/train_product.hpp"

namespace dso {

struct ProductGrid {
  int64_t rows, columns;  // per block of a task
};

// Block size for C[M, N] (the largest of several) on `threads` threads. Only affects speed.
ProductGrid cut_product(int64_t M, int64_t N, int64_t jobs, int threads);

struct Context;
void multiply(Context& c, const std::vector<ProductJob>& jobs, bool exact);

}  // namespace dso
