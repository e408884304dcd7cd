"""Random values and integers for tests of single kernels."""

from __future__ import annotations

import numpy as np
import torch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(values) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
