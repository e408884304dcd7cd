"""PEFT LoRA adapters: adapter_config.json and adapter_model.safetensors, checked before tensors are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ..errors import AdapterError, CheckpointError, shown
from .base import TensorInfo, all_finite
from .files import DataFile, inside
from .lora_config import MERGE, read_lora_config
from .safetensors import FLOATS, open_safetensors

WEIGHTS: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PAIR: Final = re.compile(r"(.+)\.lora_(A|B)\.weight")
_OTHER: Final = {  # parts of a tensor's name -> what it belongs to
    ".base_layer.": "a weight of the model, saved because its embedding or output head is adapted",
    "lora_embedding_": "an adapted embedding", "lora_magnitude_vector": "DoRA", ".lora_A.bias": "a bias",
    ".lora_B.bias": "a bias", "modules_to_save": "a fully trained module", "token_adapter": "trained token embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class StoredPair:
    """The matrices of one module, not read yet.

    Attributes:
        rank, inputs, outputs: A is [rank, inputs], B [outputs, rank].
    """

    down: TensorInfo
    up: TensorInfo

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def inputs(self) -> int:
        return self.down.shape[1]

    @property
    def outputs(self) -> int:
        return self.up.shape[0]


class LoraFile:
    """An open adapter whose header has been checked.

    Attributes:
        path: its directory.
        config: its settings.
        pairs: by module path as in the file, without PEFT's prefix.
    """

    def __init__(self, directory: Path) -> None:
        """Raises:
        CheckpointError: a file is missing or damaged.
        AdapterError: the adapter has a feature that is not supported.
        """
        self.path, self.config = directory, read_lora_config(directory)
        if not (directory / WEIGHTS).exists():
            pickled = (directory / "adapter_model.bin").exists()
            remedy = "; adapter_model.bin can run code when opened and is not read: save it again as safetensors"
            raise CheckpointError(f"contains no {WEIGHTS}{remedy if pickled else ''}", file=directory)
        self._file = DataFile(inside(directory, WEIGHTS))
        try:
            self.pairs = self._pairs(open_safetensors(self._file).tensors.values())
        except BaseException:
            self._file.close()
            raise

    def _pairs(self, tensors: Iterable[TensorInfo]) -> dict[str, StoredPair]:
        halves: dict[str, dict[str, TensorInfo]] = {}
        for info in tensors:
            match = _PAIR.fullmatch(info.name.removeprefix(_PREFIX))
            if match is None:
                what = next((what for part, what in _OTHER.items() if part in info.name), "not a LoRA matrix")
                raise AdapterError(
                    f"tensor {shown(info.name)} is {what}, which is not supported; {MERGE}",
                    path=self.path,
                )
            halves.setdefault(match[1], {})[match[2]] = info
        return {module: self._pair(module, both) for module, both in halves.items()}

    def _pair(self, module: str, both: dict[str, TensorInfo]) -> StoredPair:
        if len(both) < 2:
            raise CheckpointError(f"has only lora_{next(iter(both))} of {shown(module)}; save it again", file=self._file.path)
        pair = StoredPair(both["A"], both["B"])
        for info in both.values():
            if len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOATS:
                raise CheckpointError(
                    f"is {info.dtype} of shape {list(info.shape)}, must be a matrix of {', '.join(FLOATS)}",
                    file=self._file.path,
                    tensor=info.name,
                )
        expected = self.config.rank_of(module)
        if (pair.rank, pair.up.shape[1]) != (expected, expected):
            raise CheckpointError(
                f"the matrices of {shown(module)} have ranks {pair.rank} and {pair.up.shape[1]}; the config says {expected}",
                file=self._file.path,
            )
        return pair

    def read(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] as stored, and B [N, r] in float32, multiplied by the module's scale.

        Raises:
            CheckpointError: a number is not finite, or the file was changed.
        """
        pair = self.pairs[module]
        down, up = (self._tensor(info) for info in (pair.down, pair.up))
        scaled = up.float() * self.config.scale_of(module)
        if not all_finite(scaled):
            raise CheckpointError(f"the matrices of {shown(module)} are not finite", file=self._file.path)
        return down, scaled

    def _tensor(self, info: TensorInfo) -> torch.Tensor:
        values = self._file.read_tensor(info.offset, info.nbytes).view(FLOATS[info.dtype]).reshape(info.shape)
        values = values.float() if values.dtype == torch.float64 else values
        if not all_finite(values):
            raise CheckpointError("contains NaN or infinity", file=self._file.path, tensor=info.name)
        return values

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError if the weights were modified since they were opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def digest_of(pairs: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    """16 bytes that identify an adapter's content, by site: what it computes, whatever its name and path."""
    digest = hashlib.blake2b(digest_size=16)
    for site in sorted(pairs):
        digest.update(site.to_bytes(4, "little"))
        for matrix in pairs[site]:
            digest.update(repr((matrix.dtype, tuple(matrix.shape))).encode())
            digest.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
