"""The importance of a matrix's input columns: the mean square of the activations of each, over a calibration text.

The error of a product y = W x is (W' - W) x. If the elements of x are uncorrelated, its mean square is the sum over W's
elements of (w' - w)^2 mean(x^2): the weighted error by which int3, int4 and q4_1 choose their scales (`quant/search.py`).
Correlations are ignored here; `quant/compensation.py` takes them into account.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def watching(modules: Mapping[str, nn.Module], add: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Returns a context manager in which `add` is called with the inputs of modules.

    Args:
        modules: name -> module.
        add: called with the name and the module's first argument.
    """

    def hook(name: str) -> Any:
        return lambda module, arguments: add(name, arguments[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ColumnSquares:
    """Sums of the squares of input columns, by the name of the matrix."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Adds activations.

        Args:
            name: name of a matrix [N, K].
            x: its input, float [..., K].
        """
        squares = x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares

    def watching(self, modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Returns a context manager in which the inputs of modules are added under their names."""
        return watching(modules, self.add)

    def sums(self) -> dict[str, torch.Tensor]:
        """Returns the sums, float64 [K] for each matrix."""
        return dict(self._sums)

    def importance(self) -> dict[str, torch.Tensor]:
        """Returns the column weights of each matrix, float32 [K], with mean 1; all zeros if all inputs were zero."""
        return {name: (s / s.mean().clamp_min(torch.finfo(s.dtype).tiny)).float() for name, s in self._sums.items()}
