"""The stored tensors of a quantized checkpoint: what is not yet assigned to a matrix, and reading of parts of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ...errors import CheckpointError
from ..base import TensorInfo
from ..files import DataFile
from ..safetensors import open_safetensors

_TYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
SCALES = ("F16", "BF16", "F32")  # dtypes of scales


class StoredTensors:
    """The tensors of a checkpoint's files.

    Attributes:
        left: tensors that belong to no quantized matrix, by name; `take` removes them.
    """

    def __init__(self, files: Mapping[Path, DataFile], tensors: Mapping[str, TensorInfo]) -> None:
        self._files = files
        self.left = dict(tensors)

    def metadata(self) -> dict[str, str]:
        """The metadata of the files' headers, merged."""
        merged: dict[str, str] = {}
        for file in self._files.values():
            merged |= open_safetensors(file).metadata
        return merged

    def names(self, suffix: str) -> list[str]:
        """Names of the tensors left that end with `suffix`, without it."""
        return [name.removesuffix(suffix) for name in self.left if name.endswith(suffix)]

    def take(self, name: str, dtypes: Sequence[str], dims: int | None = None, owner: TensorInfo | None = None) -> TensorInfo:
        """Removes a tensor from `left` and returns it.

        Args:
            name: of the tensor.
            dtypes: those it may have.
            dims: number of its dimensions, none of them 0; None: any.
            owner: the tensor that needs this one, for the errors.

        Raises:
            CheckpointError: it is missing, or has another dtype or number of dimensions.
        """
        if name not in self.left:
            raise CheckpointError(
                f"needs {name}, which is missing; download the files again",
                file=owner.file if owner else None,
                tensor=owner.name if owner else name,
            )
        info = self.left[name]
        if info.dtype not in dtypes or (dims is not None and (len(info.shape) != dims or 0 in info.shape)):
            form = " or ".join(dtypes) + ("" if dims is None else f" with {dims} dimensions greater than 0")
            raise wrong(info, f"is {info.dtype} of shape {info.shape}, but must be {form}")
        return self.left.pop(name)

    def optional(self, name: str, dtypes: Sequence[str], dims: int | None = None) -> TensorInfo | None:
        """`take` of a tensor that may be absent: then None."""
        return self.take(name, dtypes, dims) if name in self.left else None

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The whole tensor in its stored dtype."""
        return self._files[info.file].read_tensor(info.offset, info.nbytes).view(_TYPES[info.dtype]).view(info.shape)

    def elements(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of the flattened tensor."""
        size = info.nbytes // max(1, math.prod(info.shape))
        data = self._files[info.file].read_tensor(info.offset + begin * size, (end - begin) * size)
        return data.view(_TYPES[info.dtype])

    def bytes(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Bytes [begin, end) of a tensor, uint8."""
        return self._files[info.file].read_tensor(info.offset + begin, end - begin)

    def rows(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) as [end - begin, cols]; all dimensions but the last count as rows."""
        cols = info.shape[-1]
        return self.elements(info, begin * cols, end * cols).view(end - begin, cols)

    def columns(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Columns [begin, end) of a matrix, read row by row."""
        if (begin, end) == (0, info.shape[1]):
            return self.read(info)
        size = info.nbytes // max(1, math.prod(info.shape))
        offset, stride = info.offset + begin * size, info.shape[1] * size
        data = self._files[info.file].read_strided(offset, stride, info.shape[0], (end - begin) * size)
        return data.view(_TYPES[info.dtype]).view(info.shape[0], end - begin)

    def group_of_columns(self, info: TensorInfo | None, size: int, groups: int) -> torch.Tensor | None:
        """The group of each column, int64 [K]; None if column k is in group k // size, which all -1 stand for too.

        Raises:
            CheckpointError: an index is not that of a group.
        """
        if info is None or groups == 1:
            return None
        group_of = self.read(info).long()
        in_order = torch.arange(group_of.numel(), dtype=torch.int64, device="cpu") // size
        if torch.equal(group_of, in_order) or bool((group_of == -1).all()):
            return None
        if bool((invalid := (group_of < 0) | (group_of >= groups)).any()):
            raise wrong(info, f"contains the group {int(group_of[invalid][0])}; there are {groups}, counted from 0")
        return group_of

    def finite(self, info: TensorInfo, values: torch.Tensor) -> torch.Tensor:
        """Scales as float32; CheckpointError if one is NaN or infinite."""
        values = values.float()
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                "contains a scale that is NaN or infinite; download the file again", file=info.file, tensor=info.name
            )
        return values


def wrong(info: TensorInfo, problem: str) -> CheckpointError:
    """An error about a tensor that does not fit the other tensors of its layer, or the config."""
    return CheckpointError(
        f"{problem}; download the files again, or check quantization_config in config.json", file=info.file, tensor=info.name
    )


def check_shape(info: TensorInfo | None, shape: tuple[int, ...], label: str) -> None:
    """CheckpointError unless a tensor has this shape, as the quantization `label` requires. None is accepted."""
    if info is not None and info.shape != shape:
        raise wrong(info, f"has shape {info.shape}; {label} requires {shape}")
