// Training: attention, cut into tasks; and their C border.
#include "../kernels/train_attention.hpp"

#include "border.hpp"
#include "dso_train.h"
#include "parallel.hpp"
