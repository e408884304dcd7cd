// The interface between kernels and runtime for training: row-wise ops, the loss and the optimizer. As in kernels.hpp: plain
// types only, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dso_train.h"

namespace dso {

struct TrainElementwise {
  // ---- the optimizer: elements [begin, end) of a tensor; begin is a multiple of 256, and so is end unless it is the tensor's
  // end
  void (*adamw)(const dso_train_update& update, int64_t begin, int64_t end);
  void (*squares)(int32_t type, const void* x, int64_t begin, int64_t end, double* sum, int64_t* not_finite);
  // out = scale x, or, with `adds`, out + scale x; elements [begin, end)
  void (*scale)(int32_t x_type, const void* x, float scale, bool adds, int64_t begin, int64_t end, int32_t out_type, void* out);
  // out = the sum of the rows which[0 .. count) of x (ld elements apart), or, with `adds`, out plus that sum; n elements
  void (*rows_summed)(int32_t x_type, const void* x, int64_t ld, const int64_t* which, int64_t count, int64_t n, bool adds,
                      int32_t out_type, void* out);

  // ---- one row each, all operands of one type; see generic/train_rows.hpp
  void (*rms_norm)(int32_t type, const void* x, const void* weight, int64_t n, float eps, void* y, float* rstd);
  void (*rms_norm_backward)(int32_t type, const void* dy, const void* x, const void* weight, float rstd, int64_t n, void* dx,
                            float* dw);
  void (*swiglu)(int32_t type, const void* gate, const void* up, int64_t n, void* h);
  void (*swiglu_backward)(int32_t type, const void* gate, const void* up, const void* dh, int64_t n, void* dgate, void* dup,
                          void* h);
  void (*rope)(const dso_train_rotation& rotation, const void* x, const void* cosine, const void* sine,
               void* out);  // all heads of one token
  // Returns the loss of a row. gradient: -1 for none, else the type of the gradient, which overwrites the logits from the start
  // of the row.
  double (*cross_entropy)(int32_t type, void* logits, int64_t n, int64_t label, float factor, int32_t gradient);
};

}  // namespace dso
