"""What an optimized model does after `.to()`, `.cuda()` or `.half()`."""

from __future__ import annotations

from typing import Any

import torch

from ..bind.instance_method import InstanceMethod


class Apply(InstanceMethod):
    """`model._apply`, which `.to()` calls: after a move to another device another backend computes; otherwise the runtime
    discards what was made from the parameters' old storage."""

    def __call__(self, fn: Any, recurse: bool = True) -> Any:
        model = self.runtime.model
        before = model.device
        torch.nn.Module._apply(model, fn, recurse)
        if model.device != before:
            self.runtime.move()
        else:
            self.runtime.rebind()
        return model
