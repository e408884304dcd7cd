// Training: row-wise ops, the loss and the optimizer, cut into tasks; and their C border.
#include "../kernels/train_elementwise.hpp"

#include "border.hpp"
#include "dso_train.h"
#include "parallel.hpp"
