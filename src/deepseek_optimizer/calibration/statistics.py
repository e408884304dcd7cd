"""Which input columns of a matrix matter: the mean square of what each is multiplied with, over a calibration text.

The error of a product y = W x is (W' - W) x. Where the columns of x are not correlated, its mean square is the sum over W's
elements of (w' - w)^2 mean(x^2): the weighted error by which int4 and q4_1 choose their scales (`quant/search.py`).
Correlations, which GPTQ follows, are left out: they take a matrix K x K a layer, and packing would no longer take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ColumnSquares:
    """Sums of the squares of input columns, by name of the matrix that reads them."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """x: float [..., K], what the matrix `name` [N, K] is multiplied with."""
        squares = x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Adds what reaches each module, as its first argument, under the module's name here."""

        def hook(name: str) -> Any:
            return lambda module, arguments: self.add(name, arguments[0])

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def importance(self) -> dict[str, torch.Tensor]:
        """Each matrix's column weights, float32 [K], of mean 1; all zeros where nothing but zeros came."""
        return {name: (s / s.mean().clamp_min(torch.finfo(s.dtype).tiny)).float() for name, s in self._sums.items()}
