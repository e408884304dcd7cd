"""The interface of every kind of checkpoint: its config, its list of tensors, and the tensors, plain or packed."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..quant import ColumnOrder, PackedMatrix, PackedStack, Packer, get_format, reference_packer
from ..quant.base import TILE_COLS, TILE_ROWS
from ..quant.overflow import largest_magnitude, overflow_of
from ..quant.parts import Span, tile_columns
from ..quant.tiles import empty_stack, empty_tiles, panels, tile_counts
from .files import Mapper
from .stacks import StackPart, StackShape, is_stack, matrices_per_expert, merged_shape, parts

NOT_FINITE = "contains NaN or infinite weights; download the file again"
PANEL_ELEMENTS = 1 << 21  # read, checked and packed at a time: 4 MB in bf16, enough for a thread pool


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor. `dtype`: as the file names it ("BF16", "Q4_1"); `offset`: bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint(ABC):
    """An open, validated checkpoint: every tensor lies within its file.

    Attributes:
        path: the directory or file that was opened.
        tensors: stored tensors by Transformers' parameter name.
        quantization: the `quantization_config` by which tensors are read, if `config` omits it.
        sampling: sampling parameters that the files recommend, besides those of a generation_config.json.
        mapper: maps packed weights into memory, to be used in place; None: they are read into memory.
        left_out: one line for each part of the files that is not loaded.
        whole: the config of the multimodal model whose language model this is, if its vision tower is left out; otherwise None.
    """

    kind: ClassVar[str]
    quantization: Mapping[str, Any] | None = None
    sampling: Mapping[str, int | float] = MappingProxyType({})
    mapper: Mapper | None = None

    def __init__(self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors = tensors
        self.left_out: list[str] = []
        self.whole: dict[str, Any] | None = None
        self._config = config

    def config(self) -> dict[str, Any]:
        """The model's config as a fresh dict, without `auto_map`: no code of the checkpoint is ever run."""
        return copy.deepcopy(self._config)

    def name_as_causal(self) -> None:
        """Renames the tensors of a decoder that was saved without a language model head, such as an embedding model, so that it
        loads as a language model. If there is no head, it is tied to the embedding. Any other checkpoint remains as it is.
        """
        if "embed_tokens.weight" not in self.tensors or any(name.startswith("model.") for name in self.tensors):
            return
        if "lm_head.weight" not in self.tensors:
            self._config["tie_word_embeddings"] = True
        self.tensors = {
            name if name.startswith("lm_head.") else f"model.{name}": info for name, info in self.tensors.items()
        }  # fmt: skip

    def info(self, name: str) -> TensorInfo:
        """The tensor stored under `name`; CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError("is missing from the checkpoint", file=self.path, tensor=name)
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape in the model, whatever form it is stored in."""
        return self.info(name).shape

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The whole tensor: in its stored float dtype, or float32 if it is stored quantized."""

    @abstractmethod
    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of a matrix, float [end - begin, cols]; of a tensor of more dimensions, all but the last count as
        rows."""

    def float_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns; of a table of experts one of integers."""
        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64}
        return dtypes.get(self.info(name).dtype, torch.float32)

    def lossless_format(self, name: str) -> str | None:
        """The weight format that represents this stored matrix exactly, if there is one."""
        return {"BF16": "bf16", "F16": "fp32", "F32": "fp32"}.get(self.info(name).dtype)

    def natural_format(self, name: str) -> str:
        """The format for this stored matrix if the user names none: a lossless one, or else the nearest in size."""
        return self.lossless_format(name) or "bf16"

    def own_format(self, name: str, shape: tuple[int, ...]) -> str:
        """`natural_format` of a parameter; of a stack, the largest among its parts that are present."""
        formats = {self.natural_format(tensor) for tensor in self.stored(name, shape) if tensor in self.tensors}
        return max(formats or {"bf16"}, key=lambda format: (get_format(format).bits, format))

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The stored tensors that make up a parameter of this shape, with their shapes: itself, or the parts of a stack."""
        if len(shape) != 3 or not is_stack(name):
            return {name: shape}
        stack: StackShape = shape
        if name in self.tensors:
            return {name: merged_shape(name, stack)}
        return dict.fromkeys((part.tensor for part in self.parts(name, stack)), shape[1:])

    def parts(self, name: str, shape: StackShape) -> list[StackPart]:
        """Where the matrices of a stack are, in order."""
        return parts(name, shape, self.tensors)

    def packed(self, name: str, format: str, packer: Packer = reference_packer) -> PackedMatrix:
        """The matrix in `format`, read and packed panel by panel: besides the result, one panel of memory is needed."""
        rows, cols = self.matrix_shape(name)
        out = empty_tiles(rows, cols, get_format(format).tile_bytes)
        self.pack_rows(name, 0, rows, format, packer, out)
        return PackedMatrix(format, rows, cols, out, self.column_order(name, format))

    def packed_part(
        self, name: str, format: str, rows: Span | None, cols: Span | None, packer: Packer = reference_packer
    ) -> PackedMatrix:
        """Rows [begin, end) and columns [begin, end) of the matrix (None: all), with the bits that they have in `packed`.
        Besides the result, one panel of memory is needed.

        Raises:
            CheckpointError: as in `packed`; or the columns are stored in another order.
        """
        shape = self.matrix_shape(name)
        if self.column_order(name, format) is not None:
            raise CheckpointError(
                "has its columns in another order, so it cannot be divided; load it without parallel",
                file=self.info(name).file,
                tensor=name,
            )
        (top, bottom), (left, right) = rows or (0, shape[0]), cols or (0, shape[1])
        tile_bytes = get_format(format).tile_bytes
        out = empty_tiles(bottom - top, right - left, tile_bytes)
        for begin, end in panels(bottom - top, shape[1], PANEL_ELEMENTS):
            tiles = torch.empty((*tile_counts(end - begin, shape[1]), tile_bytes), dtype=torch.uint8, device="cpu")
            self.pack_rows(name, top + begin, top + end, format, packer, tiles)
            first = begin // TILE_ROWS
            out[first : first + len(tiles)] = tile_columns(tiles, format, left // TILE_COLS, -(-right // TILE_COLS))
        return PackedMatrix(format, bottom - top, right - left, out)

    def column_order(self, name: str, format: str) -> ColumnOrder | None:
        """The order of the columns of a matrix that is packed in this format, see `PackedMatrix`."""
        return None

    def packed_stack(self, name: str, format: str, shape: StackShape, packer: Packer = reference_packer) -> PackedStack:
        """A stack in `format`, packed matrix by matrix as in `packed`."""
        count, rows, cols = shape
        out = empty_stack(count, rows, cols, get_format(format).tile_bytes)
        self.pack_matrices(name, format, shape, 0, packer, out)
        return PackedStack(format, count, rows, cols, out)

    def packed_stack_part(
        self,
        name: str,
        format: str,
        shape: StackShape,
        experts: Span | None,
        rows: Span | None,
        cols: Span | None,
        packer: Packer = reference_packer,
    ) -> PackedStack:
        """Of the stack some experts, and of their matrices rows and columns (None: all), with the bits that they have in
        `packed_stack`. Besides the result, the memory of an expert is needed.

        Args:
            shape: of the whole stack.
        """
        count, height, width = shape
        tile_bytes, step = get_format(format).tile_bytes, matrices_per_expert(name)
        begin, end = experts or (0, count // step)
        (top, bottom), (left, right) = rows or (0, height), cols or (0, width)
        out = empty_stack(step * (end - begin), bottom - top, right - left, tile_bytes)
        if rows is None and cols is None:
            self.pack_matrices(name, format, shape, step * begin, packer, out)
            return PackedStack(format, len(out), height, width, out)
        whole = empty_stack(step, height, width, tile_bytes)
        for expert in range(begin, end):
            self.pack_matrices(name, format, shape, step * expert, packer, whole)
            taken = whole[:, top // TILE_ROWS : -(-bottom // TILE_ROWS)]
            taken = tile_columns(taken, format, left // TILE_COLS, -(-right // TILE_COLS))
            out[step * (expert - begin) : step * (expert - begin + 1)] = taken
        return PackedStack(format, len(out), bottom - top, right - left, out)

    def stack_pieces(
        self, name: str, format: str, shape: StackShape, packer: Packer, piece_bytes: int
    ) -> Iterator[PackedStack]:
        """`packed_stack` in pieces of whole experts, in order, each of about `piece_bytes` at most."""
        count, rows, cols = shape
        tile_bytes, step = get_format(format).tile_bytes, matrices_per_expert(name)
        step *= max(1, piece_bytes // math.prod((step, *tile_counts(rows, cols), tile_bytes)))
        for first in range(0, count, step):
            out = empty_stack(min(step, count - first), rows, cols, tile_bytes)
            self.pack_matrices(name, format, shape, first, packer, out)
            yield PackedStack(format, len(out), rows, cols, out)
            del out  # only the caller may keep it alive

    def pack_matrices(self, name: str, format: str, shape: StackShape, first: int, packer: Packer, out: torch.Tensor) -> None:
        """Packs the matrices of a stack from `first` on, whose tiles are `out`; they are those of whole experts."""
        for tiles, part in zip(out, self.parts(name, shape)[first : first + len(out)], strict=True):
            self.pack_rows(part.tensor, part.row, part.row + shape[1], format, packer, tiles)

    def pack_rows(self, name: str, begin: int, end: int, format: str, packer: Packer, out: torch.Tensor) -> None:
        """Rows [begin, end) of a stored matrix, packed as a matrix of their own into the tiles `out`, in `column_order`."""
        for top, bottom in panels(end - begin, self.shape(name)[-1], PANEL_ELEMENTS):
            panel = self.read_rows(name, begin + top, begin + bottom)
            self.pack_checked(name, panel, format, packer, out[top // TILE_ROWS : -(-bottom // TILE_ROWS)])

    def pack_checked(self, name: str, values: torch.Tensor, format: str, packer: Packer, tiles: torch.Tensor) -> None:
        """Packs a part of the tensor stored as `name` into `tiles`; CheckpointError if a weight is NaN or infinite, or too
        large for the format."""
        largest = largest_magnitude(values)
        if not math.isfinite(largest):
            raise CheckpointError(NOT_FINITE, file=self.info(name).file, tensor=name)
        packer(values, format, tiles)
        if (problem := overflow_of(values, tiles, format, largest)) is not None:
            raise CheckpointError(problem, file=self.info(name).file, tensor=name)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix; CheckpointError for anything else."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"has shape {shape}, which is not a matrix", file=self.info(name).file, tensor=name)
        return shape

    def check_dtype(self, name: str) -> None:
        """CheckpointError if the tensor stored under `name` is not a weight: integers, or codes without a scale."""
        return  # checkpoints that validate every dtype on opening have nothing to add

    def check_finite(self, name: str, values: torch.Tensor) -> None:
        """CheckpointError if a weight is NaN or infinite."""
        if not all_finite(values):
            raise CheckpointError(NOT_FINITE, file=self.info(name).file, tensor=name)

    def ignores(self, name: str) -> bool:
        """Whether a stored tensor that the model does not have may be left out silently."""
        return False

    def conversions(self) -> list[str]:
        """One line for each kind of stored weight that was not preserved exactly where the user may expect it."""
        return []

    def remarks(self) -> list[str]:
        """One line for each part of the files that is not loaded."""
        return self.left_out

    def mappings(self) -> list[Any]:
        """The mappings, made by the mapper, that tensors point into."""
        return []

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError if a file was modified after it was opened: the data read may mix two versions."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files. Tensors that were returned remain valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def all_finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return math.isfinite(largest_magnitude(values))
