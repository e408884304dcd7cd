"""Quantization-aware training: forward and backward pass use the weights as their packed format rounds them.

The straight-through estimator (Bengio et al., arXiv 1308.3432) applies the gradient of the rounded weights to the original
ones. Here, as in BinaryConnect (Courbariaux et al., arXiv 1511.00363) and torchao's PARQ, the model's parameters hold the
rounded weights during the passes and the original ones during the optimizer's steps, so that no module has to be changed.

Training starts from error-compensated rounding (`calibrate`): the parameters are moved to where they round to its codes, and a
group keeps its codes and scales until its weights have moved (`quant/moved.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import torch

from ..backends.registry import choose_backend
from ..calibration.text import LENGTH
from ..config import DeepSeekConfig, Precision
from ..errors import ConfigError
from ..integration.bind.swap import stored_tensors
from ..integration.load.optimize_in_place import optimize_in_place
from ..integration.load.rounding import Outcome, round_in_place
from ..integration.training.packing import PackableWeight, packable_weights, write_packed
from ..quant import GROUP_FORMATS, GroupFormat, PackedMatrix, PackedWeight, WholeGroups, get_format
from ..quant.moved import MovedMatrix, between
from ..quant.tiles import empty_stack, panels
from ..quant.transposed_stack import stacked_matrices
from .ops import native

TOKENS: Final = 8192  # of the training data are calibrated on
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


def calibration_texts(rows: Any, config: Any) -> list[torch.Tensor]:
    """Stretches of training data to calibrate on: token ids, int64 [1, n] each.

    Args:
        rows: the data set. Rows are taken at random, always the same, until there are enough tokens; from a stream the first.
        config: the model's.
    """
    length = min(LENGTH, int(getattr(config, "max_position_embeddings", None) or LENGTH))
    ids, count = [], 0
    for row in _shuffled(rows):
        tokens = torch.as_tensor(row["input_ids"], dtype=torch.int64, device="cpu").flatten()
        if (mask := row.get("attention_mask")) is not None:
            tokens = tokens[torch.as_tensor(mask, dtype=torch.bool, device="cpu").flatten()]
        ids.append(tokens)
        count += len(tokens)
        if count >= TOKENS:
            break
    joined = torch.cat(ids)[None]
    return [part for part in joined.split(length, dim=1) if part.shape[1] == length] or [joined]


def _shuffled(rows: Any) -> Iterable[Mapping[str, Any]]:
    if not hasattr(rows, "__len__"):
        return rows
    generator = torch.Generator(device="cpu").manual_seed(0)
    order = torch.randperm(len(rows), generator=generator, dtype=torch.int64, device="cpu")
    return (rows[i] for i in order.tolist())


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
        self._moved: dict[str, MovedMatrix] = {}  # by name of the weight and index of the matrix

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

    def calibrate(
        self, model: Any, texts: Sequence[torch.Tensor], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Outcome:
        """Sets the weights such that rounding them gives the codes and scales of error-compensated rounding.

        Args:
            model: the model that was passed at construction; a copy of it is in memory meanwhile.
            texts: token ids, int64 [1, n] each.
            progress: see `round_in_place`.

        Returns: what was rounded with compensation.
        """
        self.restore()
        found, outcome = _compensated(model, self.config, texts, progress)
        with torch.no_grad():
            for weight in self._weights:
                packed = found[weight.name]
                for i, (target, matrix) in enumerate(zip(self._matrices(weight), _matrices_of(packed), strict=True)):
                    values = self._backend.unpack(matrix)
                    if (format := _moved_format(matrix.format)) is not None:
                        moved = self._moved[f"{weight.name}.{i}"] = MovedMatrix(format, format.parameters(matrix.data))
                        moved.start(target, values)
                    elif matrix.format in GROUP_FORMATS:
                        values = between(target.float(), values, partial(self._rounded_matrix, format=matrix.format))
                    target.copy_(values)
        return outcome

    def state(self) -> dict[str, list[torch.Tensor]]:
        """What rounding depends on besides the weights: after `calibrate`, the parameters of the matrices that it rounded."""
        return {name: list(moved.parameters) for name, moved in self._moved.items()}

    def load_state(self, state: Mapping[str, list[torch.Tensor]]) -> None:
        """Sets what `state` returned."""
        self.restore()
        formats = {f"{weight.name}.{i}": weight.packed.format for weight in self._weights for i in range(_count(weight.packed))}
        self._moved = {}
        for name, parameters in state.items():
            format = _moved_format(formats[name])
            assert format is not None
            self._moved[name] = MovedMatrix(format, tuple(parameters))

    def write(self, model: Any, folder: Path) -> None:
        """Writes the packed checkpoint of the model, which load_model loads, to a directory that exists."""
        self.restore()
        write_packed(model, self._weights, self.config, self._tiles, folder)

    def _matrices(self, weight: PackableWeight, tensor: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """The matrices of a weight's parameter, or of a tensor of its shape, as views of it."""
        tensor = weight.parameter.data if tensor is None else tensor
        if isinstance(weight.packed, PackedMatrix):
            return [tensor]
        return stacked_matrices(tensor, weight.packed.shape, weight.layout)

    def _rounded(self, weight: PackableWeight) -> torch.Tensor:
        """unpack(pack(weight)), in the weight's dtype: exact in fp32, rounded once more in bf16."""
        out = native.new(weight.parameter.shape, weight.parameter.data)
        for i, (source, target) in enumerate(zip(self._matrices(weight), self._matrices(weight, out), strict=True)):
            if (moved := self._moved.get(f"{weight.name}.{i}")) is not None:
                moved.rounded(source, target)
            else:
                self._round_matrix(source, target, weight.packed.format)
        return out

    def _rounded_matrix(self, source: torch.Tensor, format: str) -> torch.Tensor:
        out = torch.empty_like(source)
        self._round_matrix(source, out, format)
        return out

    def _round_matrix(self, source: torch.Tensor, out: torch.Tensor, format: str) -> None:
        for begin, end in panels(*source.shape):
            tiles = self._backend.pack(source[begin:end], format)
            out[begin:end] = self._backend.unpack(PackedMatrix(format, end - begin, source.shape[1], tiles))

    def _tiles(self, weight: PackableWeight) -> torch.Tensor:
        like = weight.packed
        out = empty_stack(_count(like), like.rows, like.cols, get_format(like.format).tile_bytes)
        for i, (matrix, tiles) in enumerate(zip(self._matrices(weight), out, strict=True)):
            if (moved := self._moved.get(f"{weight.name}.{i}")) is not None:
                moved.tiles(matrix, tiles)
            else:
                self._backend.pack(matrix, like.format, tiles)
        return out[0] if isinstance(like, PackedMatrix) else out


def _compensated(
    model: Any, config: DeepSeekConfig, texts: Sequence[torch.Tensor], progress: Callable[[int, int], None]
) -> tuple[dict[str, PackedWeight], Outcome]:
    """The packed weights of a float model by name, rounded with error compensation, and what was rounded.

    The model stays as it is; a copy of it is in memory meanwhile. The other arguments are those of `round_in_place`.
    """
    twin = copy.deepcopy(model)
    optimize_in_place(twin, DeepSeekConfig(mtp="off"))
    outcome = round_in_place(twin, config, [text.to(model.device) for text in texts], progress)
    return {name: weight for name, weight in stored_tensors(twin).items() if not isinstance(weight, torch.Tensor)}, outcome


def _matrices_of(weight: PackedWeight) -> Sequence[PackedMatrix]:
    return [weight] if isinstance(weight, PackedMatrix) else [weight.matrix(i) for i in range(weight.count)]


def _count(weight: PackedWeight) -> int:
    return 1 if isinstance(weight, PackedMatrix) else weight.count


def _moved_format(name: str) -> GroupFormat | None:
    """The format if its codes and parameters must be kept: packing values that it represents may choose others.

    int3's are chosen together, and those of its values again, nearly always.
    """
    format = GROUP_FORMATS.get(name)
    return None if isinstance(format, WholeGroups) else format
