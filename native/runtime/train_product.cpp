// Training: matrix products, cut into tasks; and their C border.
#include "../kernels/train_product.hpp"

#include "border.hpp"
#include "dso_train.h"
#include "parallel.hpp"
