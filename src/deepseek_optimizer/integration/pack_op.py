"""The loading operation that packs: Transformers calls it with each float weight as it streams in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from ..checkpoint import all_finite
from ..errors import CheckpointError


class PackWeight(ConversionOps):
    """Packs one parameter.

    Args:
        quantizer: the `PackingQuantizer`, which knows the packer and the files that are read.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]  # the patterns of a converter that merges or splits do not concern us
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        assert full_layer_name is not None
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        rows, cols = module.packed.rows, module.packed.cols
        if tuple(weight.shape) != (rows, cols):
            raise CheckpointError(
                f"has shape {tuple(weight.shape)}, the config makes it {(rows, cols)}", tensor=full_layer_name
            )
        if not all_finite(weight):
            self.quantizer.not_finite.append(full_layer_name)  # said after loading: Transformers hides an error raised here
        tiles = self.quantizer.packer(weight, module.format)
        self.quantizer.mapped.was_read(weight.nbytes)  # else the whole float file would stay in memory until loading ends
        return {full_layer_name: nn.Parameter(tiles, requires_grad=False)}
