"""What the forward keeps for the backward, and what is made again there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Recipe:
    """What stands in the autograd graph in place of a tensor: how to make it, and the shape that was saved."""

    make: Make
    shape: torch.Size


class Kept:
    """Lets a module say of its result that it is cheap to make again, so that whoever would save it keeps how it is made.

    with kept:
        y = kept.again(rms_norm(x, w), partial(rms_norm, x.detach(), w.detach()))
        loss = linear(y, v).sum()   # saves a recipe that holds x and w, and not y

    It works through torch's hooks for saved tensors, so it holds for adapters and modules that know nothing of it. A tensor
    that is read by several products is made again for each.

    Args:
        everything: nothing is made again.
    """

    def __init__(self, everything: bool = False) -> None:
        self.everything = everything
        self._marked: dict[int, tuple[weakref.ref[torch.Tensor], Make]] = {}
        self._hooks: list[Any] = []

    def again(self, result: torch.Tensor, make: Make) -> torch.Tensor:
        """`result`, of which `make` is known to give the same bits from what is kept anyway."""
        if self._hooks and not self.everything and result.requires_grad and result.is_contiguous():
            self._marked[result.data_ptr()] = (weakref.ref(result), make)
        return result

    def __enter__(self) -> Kept:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)
        self._marked.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Recipe:
        found = self._marked.get(tensor.data_ptr())
        if found is None:
            return tensor
        marked = found[0]()
        # a marked tensor that is gone may have left its memory to another; one that is there cannot have
        if marked is None or marked.numel() != tensor.numel() or marked.dtype != tensor.dtype or not tensor.is_contiguous():
            return tensor
        return _Recipe(found[1], tensor.shape)

    @staticmethod
    def _unpack(packed: torch.Tensor | _Recipe) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return packed.make().view(packed.shape)
