"""The packed linear layers of the general path.

Transformers' modules compute with them as with the originals. Some also read `layer.weight`: most of them only its dtype or
shape, some its values (DeBERTa's attention, Mamba's time steps). Both get what the float layer would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..bind.modules import PackedLinear


class LazyWeight(torch.Tensor):
    """A float matrix that is dequantized when an operation reads its values; dtype, shape and device cost nothing.

    Args:
        shape, dtype, device: of the matrix.
        read: returns its values.
    """

    read: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: Any, read: Callable[[], torch.Tensor]) -> LazyWeight:
        weight: LazyWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight.read = read
        weight._is_param = True  # isinstance(weight, nn.Parameter)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers does not initialize it
        return weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def values(argument: Any) -> Any:
            return argument.read() if isinstance(argument, LazyWeight) else argument

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.dtype})"


class GeneralLinear(PackedLinear):
    """y = x W^T + b with W packed, in place of an `nn.Linear`. The tiles are the parameter "weight" of the state dict."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """W as the float layer has it: [N, K], in the layer's dtype. Read-only."""
        shape = (self.out_features, self.in_features) if self.layout == "rows" else (self.in_features, self.out_features)
        tiles: Any = self._parameters["weight"]
        return LazyWeight(shape, self.dtype, tiles.device, self._float_weight)

    def _float_weight(self) -> torch.Tensor:
        tiles: Any = self._parameters["weight"]
        if tiles.dtype != torch.uint8:
            return tiles.data  # a placeholder, while a checkpoint is loaded
        weight = self.dequantized(self.dtype)
        return weight if self.layout == "rows" else weight.t()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return super().forward(input)
        return self.product(input, self.packed, self.bias).to(input.dtype)


class GeneralConv1D(GeneralLinear):
    """The same in place of Transformers' `Conv1D` (GPT-2), which stores W as [K, N]."""

    layout = "columns"

    @property
    def nf(self) -> int:
        """Number of output features, as in `Conv1D`."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Number of input features, as in `Conv1D`."""
        return self.in_features
