"""The language model head on the general path: the float weight stays, and products use a packed copy of it.

The weight is usually tied to the embedding, and may be resized, tied again or trained, so Transformers keeps it. Reading it in
full for every token would take as long as all packed layers together.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...config import DeepSeekConfig
from ...quant import PackedMatrix, Packer, get_format
from ..bind.modules import Product
from ..bind.swap import NATURAL, matrix_tiles, substitute


class PackedHead(nn.Linear):
    """`nn.Linear` whose products without gradient use packed tiles, as long as its weight is the one that was packed.

    Args:
        head: the module to replace; its parameters are shared.
        format: name of the weight format.
        tiles: the packed weight.

    Attributes:
        product: computes x W^T + b; the runtime sets it.
    """

    tiles: torch.Tensor
    product: Product

    def __init__(self, head: nn.Linear, format: str, tiles: torch.Tensor) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features, self.format = head.in_features, head.out_features, format
        self.weight, self.bias = head.weight, head.bias
        self.register_buffer("tiles", tiles, persistent=False)
        self._packed_version = self._version_of_weight()
        self._is_hf_initialized = True

    def _version_of_weight(self) -> tuple[int, int]:
        """Changes when the weight is replaced or written to."""
        return self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        graph = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if graph or self._version_of_weight() != self._packed_version:
            return F.linear(input.contiguous(), self.weight, self.bias)
        matrix = PackedMatrix(self.format, self.out_features, self.in_features, self.tiles)
        return self.product(input, matrix, self.bias).to(input.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedHead:
        twin = object.__new__(PackedHead)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._packed_version = twin._version_of_weight()
        return twin


def head_name(model: Any) -> str | None:
    """The name of the model's head, which is or will be a `PackedHead`; None: it has no such head."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) not in (nn.Linear, PackedHead) or head.weight.dtype not in NATURAL:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def pack_head(model: Any, config: DeepSeekConfig, packer: Packer) -> None:
    """Gives the model's head a packed copy of its weight, if that is smaller than the float weight."""
    name = head_name(model)
    if name is None:
        return
    head = model.get_submodule(name)
    format = config.format_of(f"{name}.weight", NATURAL[head.weight.dtype])
    if get_format(format).bits < 8 * head.weight.element_size():
        substitute(model, head, PackedHead(head, format, matrix_tiles(f"{name}.weight", head.weight.data, format, packer)))
