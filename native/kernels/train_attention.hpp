// The interface between kernels and runtime for attention that reads no plan's cache: in training, in encoders (forward only),
// and for callers that keep keys and values themselves. As in kernels.hpp: plain types only, no std header with inline code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dso {

constexpr int64_t train_attn_width = 256;  // largest qk_width and v_width
constexpr int64_t train_attn_block = 64;   // tokens; tasks begin at multiples of it

template <class Byte>
struct Heads {  // elements of several heads; strides are in elements
  Byte* data;   // the first head of the sequence's first token
  int64_t token, head;

  template <class T>
  T* row(int64_t h, int64_t t) const {
    return (T*)data + h * head + t * token;
  }
};

// One sequence and one kv head with the query heads that share it. Token t sees tokens (t - window, t]; window 0: [0, t]. If
// `bidirectional`, it sees [t - window, t + window]; window 0: all tokens.
struct TrainAttnTask {
  int32_t type;  // DSO_TYPE_* of everything but the fp32 state
  int64_t tokens, qk_width, v_width;
  int64_t group;  // query heads
  float scale;
  int64_t window;
  bool bidirectional;  // forward in fp32 only
  int64_t begin, end;  // of queries (forward) or keys (backward); begin is a multiple of train_attn_block
  Heads<const void> q, k, v;
  Heads<void> o;  // forward: written; backward: read
  // Per query head and token: the largest logit in units of log 2, and the sum of 2^(logit - largest). Both are stored, instead
  // of the logarithm of the sum, so that the backward pass computes bitwise equal weights, however large the logits are.
  // state_head: head stride of both. Null: not stored.
  float *largest, *sum;
  int64_t state_head;
  // backward only
  Heads<const void> o_grad;
  Heads<void> q_grad, k_grad, v_grad;  // q_grad: used by the runtime, which calls query_grad to write it
  // Transposed blocks of fp32 sums that query_grad adds up: block i of head h at (h * blocks + i) *
  // train_attn_query_grad(qk_width), with blocks counted from `begin` to the end of the sequence. Blocks whose queries see none
  // of the keys are not written.
  float* q_sums;
};

constexpr int64_t train_attn_query_grad(int64_t qk_width) {
  return (qk_width + 31) / 32 * 32 * train_attn_block;
}  // floats per block

constexpr int64_t dense_attn_rows = 8;  // with more queries, products of matrices are faster than one query after the other

// One q head of one sequence of a cache that is no plan's. Strides are in elements.
struct DenseAttnTask {
  int32_t type;       // DSO_TYPE_* of q, k, v, o, and of a mask of numbers
  int32_t mask_type;  // DSO_MASK_*
  bool rounded;       // fp32 tensors: with more than a few queries, their products are those of bf16
  int64_t queries, keys, qk_width, v_width;
  float scale;
  const void *q, *k, *v, *mask;
  void* o;
  int64_t q_token, k_token, v_token, o_token, mask_query;  // from one token to the next
};

struct TrainAttention {
  // Scratch bytes per task, private to its thread, 64-aligned.
  int64_t (*forward_scratch)(const TrainAttnTask& task);
  int64_t (*backward_scratch)(const TrainAttnTask& task);
  void (*forward)(const TrainAttnTask& task, uint8_t* scratch);
  void (*backward)(const TrainAttnTask& task, uint8_t* scratch);
  // Rows of q's gradient: the sum of `count` (at most train_attn_block) rows of parts[0], parts[1] .., in this order, times
  // scale. A part is a block as written by `backward`.
  void (*query_grad)(int32_t type, const float* const* parts, int64_t part_count, int64_t count, int64_t qk_width, float scale,
                     void* out, int64_t out_token);
  // Scratch as for the others. A query all of whose keys are hidden gets zeros.
  int64_t (*dense_scratch)(const DenseAttnTask& task);
  void (*dense)(const DenseAttnTask& task, uint8_t* scratch);
};

}  // namespace dso
