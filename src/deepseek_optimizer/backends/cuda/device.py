"""The device that kernels are launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one, on which Triton launches, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
