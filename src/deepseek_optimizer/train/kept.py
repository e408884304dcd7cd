"""What the forward keeps for the backward, and what is made again there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Make = Callable[[], torch.Tensor]


@dataclass
class _Recipe:
    """How a tensor is made again, once for all who saved it: their backwards follow each other."""

    make: Make
    savers: int = 0
    _made: torch.Tensor | None = None
    _left: int = 0

    def give(self) -> torch.Tensor:
        if self._made is None:
            self._made, self._left = self.make(), self.savers
        made, self._left = self._made, self._left - 1
        if self._left <= 0:
            self._made = None
        return made


@dataclass(frozen=True)
class _Mark:
    """A result, how often it had been changed in place when it was marked, and its recipe."""

    result: weakref.ref[torch.Tensor]
    version: int
    recipe: _Recipe


@dataclass(frozen=True)
class _Saved:
    """What stands in the autograd graph in place of a tensor: its recipe, and the shape that was saved."""

    recipe: _Recipe
    shape: torch.Size


class Kept:
    """Lets a module say of its result that it is cheap to make again, so that whoever would save it keeps how it is made.

    with kept:
        y = kept.again(rms_norm(x, w), partial(rms_norm, x.detach(), w.detach()))
        loss = linear(y, v).sum()   # saves a recipe that holds x and w, and not y

    It works through torch's hooks for saved tensors, so it holds for adapters and modules that know nothing of it.

    Args:
        everything: nothing is made again.
    """

    def __init__(self, everything: bool = False) -> None:
        self.everything = everything
        self._marked: dict[int, _Mark] = {}
        self._hooks: list[Any] = []

    def again(self, result: torch.Tensor, make: Make) -> torch.Tensor:
        """`result`, of which `make` is known to give the same bits from what is kept anyway."""
        if self._hooks and not self.everything and result.requires_grad and result.is_contiguous():
            place = result.data_ptr()
            self._marked[place] = _Mark(weakref.ref(result, partial(self._gone, place)), result._version, _Recipe(make))
        return result

    def _gone(self, place: int, result: weakref.ref[torch.Tensor]) -> None:
        """Recipes that nobody has saved go with their results: under checkpointing that is all of them."""
        if place in self._marked and self._marked[place].result is result:
            del self._marked[place]

    def __enter__(self) -> Kept:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)
        self._marked.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        found = self._marked.get(tensor.data_ptr())
        if found is None:
            return tensor
        marked = found.result()
        # a marked tensor that is gone may have left its memory to another; one that is there cannot have
        if marked is None or marked.numel() != tensor.numel() or marked.dtype != tensor.dtype or not tensor.is_contiguous():
            return tensor
        if tensor._version != found.version:  # changed in place since: its recipe makes what it was
            return tensor
        found.recipe.savers += 1
        return _Saved(found.recipe, tensor.shape)

    @staticmethod
    def _unpack(packed: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return packed.recipe.give().view(packed.shape)
