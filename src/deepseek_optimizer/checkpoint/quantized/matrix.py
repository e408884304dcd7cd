"""The interface of a quantized matrix: the tensors of one linear layer in a checkpoint, read as rows of one float matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...quant.tiles import panels
from .. import base
from ..base import TensorInfo


@dataclass(frozen=True)
class Kept:
    """Rows in a form that a `Packer` stores without quantizing them again.

    Attributes:
        weight: ggml blocks or float8_e4m3fn codes, see `Packer`.
        exact: whether they represent exactly the stored values; otherwise, scales or minima were rounded to float16.
        scale: of float8 codes, see `Packer`.
    """

    weight: torch.Tensor
    exact: bool
    scale: torch.Tensor | None = None


class StoredRows(ABC):
    """Rows of a quantized matrix, as stored, in memory."""

    @abstractmethod
    def floats(self) -> torch.Tensor:
        """The rows dequantized: float32 [n, K]."""

    def kept(self, format: str) -> Kept | None:
        """The rows for a weight format that can hold their codes; None if it cannot."""
        return None


class QuantizedMatrix(ABC):
    """A quantized matrix [N, K], or a stack of them [..., N, K] of which all dimensions but the last count as rows.

    Attributes:
        label: of its quantization, for reports: "GPTQ 4-bit, group 128".
        shape: of the float matrix.
        stored: its tensors in the checkpoint; errors about the whole matrix name the first.
        lossless: the weight format that holds its values exactly, if its scales are float16 values; None if there is none.
        natural: the format to use if the user names none.
    """

    natural: str
    lossless: str | None

    def __init__(self, label: str, shape: tuple[int, ...], stored: tuple[TensorInfo, ...]) -> None:
        self.label, self.shape, self.stored = label, shape, stored

    @abstractmethod
    def rows(self, begin: int, end: int) -> StoredRows:
        """Reads rows [begin, end).

        Raises:
            CheckpointError: a scale is not finite, or an index or code is out of range; names file and tensor.
        """

    def panels(self, begin: int, end: int) -> Iterator[tuple[int, int, StoredRows]]:
        """Reads rows [begin, end) by panels: yields (top, bottom, rows), where top and bottom count from `begin`.

        A method whose rows are spread over the file reads all packed codes first, and unpacks them by panels.
        """
        for top, bottom in panels(end - begin, self.shape[-1], base.PANEL_ELEMENTS):
            yield top, bottom, self.rows(begin + top, begin + bottom)
