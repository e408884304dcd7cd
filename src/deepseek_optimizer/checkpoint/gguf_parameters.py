"""Parameters of a model as rows of the tensors in a GGUF file.

llama.cpp's converter splits, joins and permutes some matrices and changes the values of some vectors. A `Parameter` describes
how to undo that. Rows are quantized independently of each other, so that a parameter made of rows of tensors of one type can
be packed without decoding it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ..quant.ggml import GgmlType
from ..quant.packed import ColumnOrder
from .gguf_header import GgufTensor

# Rows [begin, end) of a stored tensor, undecoded; all dimensions but the last count as rows.
ReadRows = Callable[[GgufTensor, int, int], torch.Tensor]
# Undecoded rows of a tensor as floats.
Decode = Callable[[GgufTensor, torch.Tensor], torch.Tensor]
Order = npt.NDArray[np.int64]

_GAP = 256  # rows between two wanted ones that are read rather than skipped


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter whose rows are rows of stored tensors.

    Attributes:
        sources: the tensors, whose rows are numbered consecutively.
        shape: in the model; the number of elements of a row is that of the sources.
        order: for each row of the parameter (for a vector: each element), the number of a source's; None: all in order.
        columns: the order in which the columns are stored; None: that of the model.
        convert: changes the stored values into the model's.
        fallback: the format in which it is packed by default if its rows must be decoded and the file has quantized them.
    """

    fallback: ClassVar[str] = "int8"

    sources: tuple[GgufTensor, ...]
    shape: tuple[int, ...]
    order: Order | None = None
    columns: ColumnOrder | None = None
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def stored_rows(self) -> int:
        """Number of rows of all sources; for a vector, of elements."""
        vector = len(self.shape) == 1
        return sum(math.prod(source.shape if vector else source.shape[:-1]) for source in self.sources)

    @property
    def type_name(self) -> str:
        """The ggml type, or all types if they differ."""
        return " and ".join(dict.fromkeys(source.type.name for source in self.sources))

    @property
    def type(self) -> GgmlType | None:
        """The type of the rows that `blocks` returns; None if the rows must be decoded."""
        kind = self.sources[0].type
        return None if self.convert or any(source.type != kind for source in self.sources) else kind

    @property
    def stored_order(self) -> ColumnOrder | None:
        """The order of the columns in the rows that `blocks` returns: the model's, unless a block has parts of two runs."""
        if self.columns is None:
            return None
        run = self.shape[-1] // (self.columns.groups * self.columns.each)
        return self.columns if run % self.sources[0].type.block else None

    def misshapen(self) -> bool:
        """Whether the sources do not have the rows or elements that the parameter is made of."""
        rows = math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]
        widths = {source.shape[-1] for source in self.sources} if len(self.shape) > 1 else set()
        if self.order is not None:
            return len(self.order) != rows or bool((self.order >= self.stored_rows).any()) or len(widths) > 1
        return self.stored_rows != rows or bool(widths - {self.shape[-1]})

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def blocks(self, begin: int, end: int, read: ReadRows) -> torch.Tensor:
        """Rows [begin, end), undecoded: uint8 [rows, bytes of a row]; columns in `stored_order`. Only if `type` is not None."""
        data = self._gather(begin, end, read)
        return data if self.columns is None or self.stored_order is not None else self.columns.restored(data)

    def floats(self, begin: int, end: int, read: ReadRows, decode: Decode) -> torch.Tensor:
        """Rows [begin, end) of a matrix, float [rows, columns]."""
        first = self.sources[0]
        if all(source.type == first.type for source in self.sources):
            values = decode(first, self._gather(begin, end, read))
        else:
            values = self._gather(begin, end, lambda tensor, *span: decode(tensor, read(tensor, *span)).float())
        if self.columns is not None:
            values = self.columns.restored(values)
        return values if self.convert is None else self.convert(values)

    def vector(self, read: Callable[[GgufTensor], torch.Tensor]) -> torch.Tensor:
        """All elements of a vector, given a function that reads a whole tensor."""
        values = torch.cat([read(source).reshape(-1) for source in self.sources])
        if self.order is not None:
            values = values[torch.from_numpy(self.order)]
        return values if self.convert is None else self.convert(values)

    def _gather(self, begin: int, end: int, read: ReadRows) -> torch.Tensor:
        if self.order is None and len(self.sources) == 1:
            return read(self.sources[0], begin, end)
        wanted = np.arange(begin, end) if self.order is None else self.order[begin:end]
        parts, places, first = [], [], 0
        for source in self.sources:
            count = math.prod(source.shape[:-1])
            place = np.flatnonzero((wanted >= first) & (wanted < first + count))
            if len(place):
                rows = wanted[place] - first
                spans = list(_spans(np.unique(rows)))
                numbers = np.concatenate([np.arange(low, high) for low, high in spans])
                data = torch.cat([read(source, int(low), int(high)) for low, high in spans])
                # in numpy for the reason given in `largest_magnitude`
                parts.append(data.numpy()[np.searchsorted(numbers, rows)])
                places.append(place)
            first += count
        gathered = np.concatenate(parts)
        return torch.from_numpy(gathered[np.argsort(np.concatenate(places), kind="stable")])


def _spans(rows: Any) -> Iterator[tuple[int, int]]:
    """Ranges that contain the ascending row numbers, without long gaps."""
    cuts = np.flatnonzero(np.diff(rows) > _GAP) + 1
    for part in np.split(rows, cuts):
        yield part[0], part[-1] + 1


def halves_first(heads: int, size: int, rotated: int) -> Order:
    """For each head, its rotated rows: even ones first, then odd ones; the other rows of the head follow in order.

    llama.cpp rotates adjacent elements (2i, 2i + 1) of some architectures, for which its converter permutes q and k;
    Transformers rotates halves.
    """
    head = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, size)])
    return (np.arange(heads)[:, None] * size + head).reshape(-1)
