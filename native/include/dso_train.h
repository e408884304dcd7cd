/* deepseek-optimizer native CPU backend: what training calls. The rules of dso.h hold. Matrices are row-major; `ld*` are elements
 * from a row to the next. Every result is the same to the bit whatever the number of threads.
 */
#ifndef DSO_TRAIN_H
#define DSO_TRAIN_H
#include "dso.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Types of numbers in memory. */
enum { DSO_TYPE_F32 = 0, DSO_TYPE_BF16 = 1 };

/* ---- products -------------------------------------------------------------------------------------------- */

/* ---- row-wise ops, the loss and the optimizer ------------------------------------------------------------- */

/* ---- attention ------------------------------------------------------------------------------------------- */

#ifdef __cplusplus
}
#endif
#endif
