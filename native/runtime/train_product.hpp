// How the products of training are cut into tasks.
#pragma once
#include <cstdint>
#include <vector>

#include "../kernels/train_product.hpp"

namespace dso {

struct ProductGrid {
  int64_t rows, columns;  // of a task's block
};

// Blocks of C[M, N] (of the largest of several) for `threads` threads. Only speed depends on it.
ProductGrid cut_product(int64_t M, int64_t N, int64_t jobs, int threads);

struct Context;
void multiply(Context& c, const std::vector<ProductJob>& jobs, bool exact);

}  // namespace dso
