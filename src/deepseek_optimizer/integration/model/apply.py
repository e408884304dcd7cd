"""What an optimized model does after `.to()`, `.cuda()` or `.half()`."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import BackendError
from ...system.cuda_device import why_no_cuda
from ..bind.host_experts import all_together, place_experts
from ..bind.instance_method import InstanceMethod
from ..bind.runnable import check_runnable


class Apply(InstanceMethod):
    """`model._apply`, which `.to()` calls: after a move to another device another backend computes; otherwise the runtime
    discards what was made from the parameters' old storage. Packed weights move to a CUDA device as they are, except experts
    that stay on the host (`host_experts.py`).

    Raises (nothing has moved then):
        BackendError: the backend that the settings name cannot run on that device.
        NotEnoughMemoryError: the weights do not fit in its free memory.
    """

    def __call__(self, fn: Any, recurse: bool = True) -> Any:
        model = self.runtime.model
        before = model.device
        target = _target(fn, before)
        placement = all_together(model)
        if target != before:
            if target.type == "cuda":
                check_runnable(model, self.runtime.config, target)
                placement = place_experts(model, self.runtime.config, target)
            placement.mark()
        torch.nn.Module._apply(model, fn, recurse)
        if model.device != before:
            self.runtime.move()
            self.runtime.placed(placement)
        else:
            self.runtime.rebind()
        return model


def _target(fn: Any, device: torch.device) -> torch.device:
    """Where `fn` moves tensors of a device to."""
    try:
        found: torch.device = fn(torch.empty(0, dtype=torch.float32, device=device)).device
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch's own, for a build without CUDA
        reason = why_no_cuda()
        # Torch names one of these if a device is missing; another error is the function's own, or of another device.
        if reason is None or not any(name in str(error) for name in ("CUDA", "NVIDIA")):
            raise
        raise BackendError(f"the model cannot move to a CUDA device: {reason}") from error
    return found
