"""Transformers' loading operations that pack weights: called with float weights as they are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter

from ...checkpoint.base import NOT_FINITE
from ...checkpoint.stacks import StackShape
from ...errors import CheckpointChangedError, CheckpointError
from ...quant import PackedStack, get_format
from ...quant.overflow import largest_magnitude, overflow_of
from ...quant.tiles import empty_stack
from ...quant.transposed_stack import StackLayout, stacked_matrices
from ..bind.swap import STACKS


class PackWeight(ConversionOps):
    """Packs one parameter: a matrix, or the experts of a layer.

    Errors are collected in `quantizer.refused` and raised after loading, because Transformers hides errors raised here.

    Args:
        quantizer: the `PackingQuantizer`, which has the packer and the files being read.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]  # only the patterns of converters for experts matter here
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = (),
        model: Any = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        assert full_layer_name is not None
        if self.quantizer.refused:
            return {}  # loading will fail
        path, _, leaf = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        weight = module.held()[leaf]
        try:
            if isinstance(weight, PackedStack):
                matrices = experts_in_turn(input_dict, source_patterns, weight.shape, module.layout)
                tiles = self._pack_stack(matrices, weight)
            else:
                (value,) = input_dict.values()
                matrix = value[0] if isinstance(value, list) else value
                tiles = self._pack(matrix.t() if module.layout != "rows" else matrix, weight.shape, weight.format)
        except CheckpointChangedError as error:
            self.quantizer.refused.append(error)
            return {}
        except CheckpointError as error:
            where = model.config.name_or_path
            self.quantizer.refused.append(CheckpointError(str(error), file=where, tensor=full_layer_name))
            return {}
        return {full_layer_name: nn.Parameter(tiles, requires_grad=False)}

    def _pack_stack(self, matrices: list[Any], weight: PackedStack) -> torch.Tensor:
        tiles = empty_stack(*weight.shape, get_format(weight.format).tile_bytes)
        for i in range(weight.count):
            self._pack(matrices[i], weight.shape[1:], weight.format, tiles[i])
            matrices[i] = None  # its memory is freed before the next is packed
        return tiles

    def _pack(self, weight: torch.Tensor, shape: tuple[int, ...], format: str, out: torch.Tensor | None = None) -> torch.Tensor:
        if tuple(weight.shape) != tuple(shape):
            raise CheckpointError(f"has shape {tuple(weight.shape)}, but the config requires {tuple(shape)}")
        largest = largest_magnitude(weight)
        if not math.isfinite(largest):
            raise CheckpointError(NOT_FINITE)
        tiles: torch.Tensor = self.quantizer.packer(weight, format, out)
        if (problem := overflow_of(weight, tiles, format, largest)) is not None:
            raise CheckpointError(problem)
        self.quantizer.mapped.was_read(weight.nbytes)  # otherwise the whole float file would stay in memory until loading ends
        return tiles


def experts_in_turn(tensors: dict[str, Any], patterns: Any, shape: StackShape, layout: StackLayout = "rows") -> list[Any]:
    """The float matrices of a stack in order; they are removed from `tensors`.

    Args:
        tensors: for each of a converter's patterns (gate, up) the list of the experts' matrices, or one merged parameter.
        patterns: the converter's patterns.
        shape: count, rows and cols of the stack.
        layout: of a merged parameter, see `quant/transposed_stack.py`.

    Raises:
        CheckpointError: the number or shape of the matrices does not match the config.
    """
    lists = [tensors.pop(pattern) for pattern in patterns if pattern in tensors] or [tensors.pop(key) for key in list(tensors)]
    merged = lists[0][0] if isinstance(lists[0], list) else lists[0]
    if merged.dim() == 3:
        if merged.numel() != math.prod(shape) or merged.shape[2 if layout == "rows" else 1] != shape[2]:
            raise CheckpointError(
                f"has shape {tuple(merged.shape)}, but the config requires {shape[0]} matrices of {shape[1:]}"
            )
        return list(stacked_matrices(merged, shape, layout))
    if any(len(matrices) * len(lists) != shape[0] for matrices in lists):
        raise CheckpointError(f"has {sum(map(len, lists))} matrices of experts, but the config requires {shape[0]}")
    in_turn = [matrices[expert] for expert in range(len(lists[0])) for matrices in lists]
    for matrices in lists:
        matrices.clear()  # only the result refers to them now
    return in_turn


class AsStored(ConversionOps):
    """Passes tensors through as they were collected: a list for each pattern of the converter."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def unmerged(conversion: Any) -> Any:
    """Removes the merging from a converter that merges modules of experts into one parameter; other conversions are returned
    unchanged."""
    if isinstance(conversion, WeightConverter) and any(isinstance(op, MergeModulelist) for op in conversion.operations):
        if all(target.endswith(STACKS) for target in conversion.target_patterns):
            conversion.operations = [AsStored()]
    return conversion
