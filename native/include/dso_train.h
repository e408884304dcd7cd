/* deepseek-optimizer native CPU backend: the functions for training. The conventions of dso.h apply. Matrices are row-major;
 * `ld*` is the number of elements from one row to the next. Every result is bitwise equal for any number of threads. */
#ifndef DSO_TRAIN_H
#define DSO_TRAIN_H
#include "dso.h"
#ifdef __cplusplus
extern "C" {
#endif

/* ---- products ----------------------------------------------------------------------------------------------
 * C[M, N] = op(A) op(B) (+ bias[N]), summed over K in fp32 and rounded once to C's type. K may be 0; nothing past the elements
 * of a row is read or written. C must not overlap A or B.
 *   NT: A[M, K] B[N, K]^T    y = x W^T
 *   NN: A[M, K] B[K, N]      dx = dy W
 *   TN: A[K, M]^T B[K, N]    dW = dy^T x
 * Elements are multiplied as bf16 (fp32 elements are rounded to it first), or as fp32 with EXACT. Every element of C is one
 * chain of additions over ascending k (how a pair of bf16 is added depends on the ISA); the bias and, with ADD, the previous
 * value of C are added last. */
enum { DSO_PRODUCT_NT = 0, DSO_PRODUCT_NN = 1, DSO_PRODUCT_TN = 2 };
enum { DSO_PRODUCT_ADD = 1, DSO_PRODUCT_EXACT = 2 };
typedef struct dso_train_matrix {
  void* data;
  int64_t ld;
  int64_t next; /* elements from one group's matrix to the next, if there is one per group */
  int32_t type, reserved;
} dso_train_matrix;
/* bias: only its data and type are used; or NULL. */
DSO_API int32_t dso_train_product(dso_context* c, int32_t form, int32_t flags, int64_t M, int64_t N, int64_t K,
                                  const dso_train_matrix* a, const dso_train_matrix* b, const dso_train_matrix* bias,
                                  const dso_train_matrix* result);
/* The same for `groups` of rows (experts), [offsets[g], offsets[g + 1]) each, ascending. NT and NN: rows of A and C are in
 * groups (M is ignored), and there is one B per group. TN: rows of A and B are in groups (K is ignored), and there is one C
 * per group; a group without rows gives zeros (with ADD: C is unchanged). */
DSO_API int32_t dso_train_grouped_product(dso_context* c, int32_t form, int32_t flags, int32_t groups, const int64_t* offsets,
                                          int64_t M, int64_t N, int64_t K, const dso_train_matrix* a, const dso_train_matrix* b,
                                          const dso_train_matrix* result);
/* sums[N] = the sum over the rows of x[T, N], in ascending order, in fp32 and rounded once: the gradient of a bias. flags:
 * ADD. */
DSO_API int32_t dso_train_column_sums(dso_context* c, int32_t flags, int64_t T, int64_t N, const dso_train_matrix* x,
                                      const dso_train_matrix* sums);

/* ---- row-wise ops, the loss and the optimizer ------------------------------------------------------------- */

/* How fp32 master weights are stored. NONE: the parameter itself is fp32. SPLIT: a bf16 parameter, rounded to nearest, and in
 * `low` the integer to add to its bits (shifted up by 16) to obtain the bits of the fp32 weight. STOCHASTIC: a bf16 parameter
 * alone, stochastically rounded so that the expected weight is exact. */
enum { DSO_MASTER_NONE = 0, DSO_MASTER_SPLIT = 1, DSO_MASTER_STOCHASTIC = 2 };
/* Adam's moments. F32: float. BF16: stochastically rounded. INT8: m int8 and v uint8, each with a float scale per 256
 * elements: m = m_scale y / (2 - |y|), y = m / 127, and v = (v_scale v / 255)^2. */
enum { DSO_MOMENTS_F32 = 0, DSO_MOMENTS_BF16 = 1, DSO_MOMENTS_INT8 = 2 };

/* One step of AdamW on a tensor of `count` elements, all dense:
 *   g = gradient_scale gradient;  m = beta1 m + rest1 g;  v = beta2 v + rest2 g g
 *   w = w - (decay w + step m / (bias2 sqrt(v) + eps))
 * key: seeds of the random bits (train/ops/random_bits.py): two for the moments, two for the weights. */
typedef struct dso_train_update {
  void* parameter;
  int16_t* low; /* SPLIT only */
  const void* gradient;
  void *m, *v;
  float *m_scale, *v_scale; /* INT8 only */
  int64_t count;
  int32_t master, moments, gradient_type;
  float gradient_scale, beta1, rest1, beta2, rest2, bias2, eps, step, decay;
  uint32_t key[4];
} dso_train_update;
DSO_API int32_t dso_train_adamw(dso_context* c, const dso_train_update* updates, int64_t updates_count);

typedef struct dso_train_numbers {
  const void* data;
  int64_t count;
  int32_t type, reserved;
} dso_train_numbers;
/* For each of `tensors_count` dense tensors: the sum of squares of its elements, and the number of non-finite ones. */
DSO_API int32_t dso_train_squares(dso_context* c, const dso_train_numbers* tensors, int64_t tensors_count, double* sums,
                                  int64_t* not_finite);
/* result = scale x, or, if `adds` is not 0, result + scale x; both dense and of the same count. Also converts between types. */
DSO_API int32_t dso_train_scale(dso_context* c, const dso_train_numbers* x, float scale, int32_t adds,
                                const dso_train_numbers* result);
/* Row v of result[result_rows, n] = the sum, in ascending order and in fp32, of the rows r of x[rows, n] with numbers[r] == v;
 * zeros if there are none. With `adds`, the sum is added to the previous content. Rows with numbers[r] == `ignored` are
 * skipped. Types may differ. */
DSO_API int32_t dso_train_rows_summed(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* x,
                                      const int64_t* numbers, int64_t ignored, int64_t result_rows,
                                      const dso_train_matrix* result, int32_t adds);

/* In the calls below, all matrices of a call have one type and `rows` rows of n elements. Weights are n elements of that type.
 */

/* y = x rstd w, rstd[row] = 1 / sqrt(mean(x^2) + eps). */
DSO_API int32_t dso_train_rms_norm(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* x, const void* weight,
                                   float eps, const dso_train_matrix* y, float* rstd);
/* dx = rstd (dy w - x rstd^2 mean(dy w x)); dw[n] (NULL: not computed) = the sum over rows of dy x rstd, in fp32, in chunks of
 * rows that do not depend on the number of threads. dx may be dy. */
DSO_API int32_t dso_train_rms_norm_backward(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* dy,
                                            const dso_train_matrix* x, const void* weight, const float* rstd,
                                            const dso_train_matrix* dx, float* dw);
/* h = silu(gate) up. h may be gate or up. */
DSO_API int32_t dso_train_swiglu(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* gate,
                                 const dso_train_matrix* up, const dso_train_matrix* h);
/* Gradients for dh; h (NULL: not computed) is recomputed. dgate, dup and h may alias gate, up and dh in any order. */
DSO_API int32_t dso_train_swiglu_backward(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* gate,
                                          const dso_train_matrix* up, const dso_train_matrix* dh, const dso_train_matrix* dgate,
                                          const dso_train_matrix* dup, const dso_train_matrix* h);

/* RoPE of x[batch, tokens, heads, head_dim]. The first 2 half elements of each head form pairs: (i, i + half), or,
 * interleaved, (2i, 2i + 1). Strides are in elements. cosine and sine: [batch, tokens, 2 half] of x's type, or half elements
 * each if `halves` is 0. Forward: element i of the result is a cos_i - b sin_i, element i + half is b cos_(i + half) + a
 * sin_(i + half). Backward: the transpose, from the result's gradient to that of x. The result may be x, but not with
 * interleaving. */
typedef struct dso_train_rotation {
  int64_t batch, tokens, heads, head_dim, half;
  int64_t x_batch, x_token, x_head, out_batch, out_token, out_head, angle_batch, angle_token;
  int32_t type, halves, interleaved, backward;
} dso_train_rotation;
DSO_API int32_t dso_train_rope(dso_context* c, const dso_train_rotation* rotation, const void* x, const void* cosine,
                               const void* sine, void* result);

/* Cross entropy of logits [rows, n] with labels[rows]: losses[row] = log(sum of e^x) - x[label]; 0 if the label is `ignored`.
 * gradient: -1, or the type of (softmax(x) - [label]) factor (0 in ignored rows), which overwrites the logits: each row from
 * its start, with the same row stride. bf16 logits have bf16 gradients. */
DSO_API int32_t dso_train_cross_entropy(dso_context* c, int64_t rows, int64_t n, const dso_train_matrix* logits,
                                        const int64_t* labels, int64_t ignored, float factor, int32_t gradient, double* losses);

/* ---- attention ----------------------------------------------------------------------------------------------
 * Causal attention of sequences packed one after the other into rows of tokens: o = softmax(scale q k^T) v, where token t of a
 * sequence sees tokens (t - window, t] of the same sequence (window 0: all up to itself). Query head h reads kv head h /
 * (heads / kv_heads). Products of bf16 elements use bf16 instructions if the ISA has them; everything else is fp32. */
typedef struct dso_train_heads {
  void* data;
  int64_t row, token, head; /* strides in elements; a head's elements are contiguous */
} dso_train_heads;
typedef struct dso_train_attention {
  int32_t type;                               /* DSO_TYPE_* of everything but state */
  int32_t heads, kv_heads, qk_width, v_width; /* widths: even, at most 256 */
  float scale;
  int64_t window;
  int64_t rows, row_tokens;
  /* Sequence i has tokens [begin[i], end[i]), counted across all rows; ascending, and none crosses the end of a row. Tokens
     between sequences are neither read nor written. */
  int64_t sequences;
  const int64_t *begin, *end;
  dso_train_heads q, k, v, o;
  float*
      state; /* [2][heads][rows * row_tokens]: for each softmax its largest logit (in units of log 2) and its sum of weights */
  /* for the backward pass, which reads all of the above */
  dso_train_heads o_grad, q_grad, k_grad, v_grad;
} dso_train_attention;
DSO_API int32_t dso_train_attention_forward(dso_context* c, const dso_train_attention* a);  /* writes o and state */
DSO_API int32_t dso_train_attention_backward(dso_context* c, const dso_train_attention* a); /* writes q_grad, k_grad, v_grad */

#ifdef __cplusplus
}
#endif
#endif
