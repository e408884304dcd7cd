"""Quantization-aware training: forward and backward pass use the weights as their packed format rounds them.

The straight-through estimator (Bengio et al., arXiv 1308.3432) applies the gradient of the rounded weights to the original
ones. Here, as in BinaryConnect (Courbariaux et al., arXiv 1511.00363) and torchao's PARQ, the model's parameters hold the
rounded weights during the passes and the original ones during the optimizer's steps, so that no module has to be changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, get_args

import torch

from ..backends.registry import choose_backend
from ..config import DeepSeekConfig, Precision
from ..errors import ConfigError
from ..integration.training.packing import PackableWeight, packable_weights, write_packed
from ..quant import PackedMatrix, get_format
from ..quant.tiles import panels
from ..quant.transposed_stack import stacked_matrices
from .ops import native

_NOT_ROUNDED: Final = ("auto", "bf16", "fp32")


def check_format(name: str) -> None:
    """ConfigError unless `quantize` may have this value."""
    if name in _NOT_ROUNDED:
        raise ConfigError(f"quantize={name!r} rounds nothing; choose a quantized format such as 'int4', or leave quantize out")
    try:
        get_format(name)
    except ConfigError as error:
        raise ConfigError(f"quantize: {error}") from None


def packing_config(name: str) -> DeepSeekConfig:
    """The settings with which `load_model` and `dso convert` pack a model in a format, without calibration."""
    fields: dict[str, Any] = {"precision": name} if name in get_args(Precision) else {"formats": {"*": name}}
    return DeepSeekConfig(**fields)


class RoundedWeights:
    """The matrices of a model that packing rounds.

    While the rounded weights are in use, the original ones take as much memory again.

    Args:
        model: a Transformers model with float weights, before `prepare`.
        format: name of a weight format.

    Raises:
        ConfigError: the weights are packed already.
        UnsupportedModelError: the model's family is not supported.
    """

    def __init__(self, model: Any, format: str) -> None:
        self.config = packing_config(format)
        self._weights = packable_weights(model, self.config)
        self._backend, _ = choose_backend(self.config, model.device)
        self._originals: list[torch.Tensor] = []

    @property
    def count(self) -> int:
        """Number of elements of the matrices."""
        return sum(weight.parameter.numel() for weight in self._weights)

    def round(self) -> None:
        """Sets the parameters to the rounded weights; does nothing if they are in use."""
        if not self._originals:
            with torch.no_grad():
                for weight in self._weights:
                    self._originals.append(weight.parameter.data)
                    weight.parameter.data = self._rounded(weight)

    def restore(self) -> None:
        """Sets the parameters to the original weights; does nothing if they are in use."""
        for weight, original in zip(self._weights, self._originals, strict=False):
            weight.parameter.data = original
        self._originals = []

    def write(self, model: Any, folder: Path) -> None:
        """Writes the packed checkpoint of the model, which load_model loads, to a directory that exists."""
        self.restore()
        write_packed(model, self._weights, self.config, self._backend.pack, folder)

    def _rounded(self, weight: PackableWeight) -> torch.Tensor:
        """unpack(pack(weight)), in the weight's dtype: exact in fp32, rounded once more in bf16."""
        source, like = weight.parameter.data, weight.packed
        out = native.new(source.shape, source)
        if isinstance(like, PackedMatrix):
            self._round_matrix(source, out, like.format)
        else:
            sources, targets = (stacked_matrices(t, like.shape, weight.layout) for t in (source, out))
            for matrix, target in zip(sources, targets, strict=True):
                self._round_matrix(matrix, target, like.format)
        return out

    def _round_matrix(self, source: torch.Tensor, out: torch.Tensor, format: str) -> None:
        for begin, end in panels(*source.shape):
            tiles = self._backend.pack(source[begin:end], format)
            out[begin:end] = self._backend.unpack(PackedMatrix(format, end - begin, source.shape[1], tiles))
