"""A directory as `save_pretrained` writes it: config.json and one or more safetensors files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import CheckpointError
from ..quant import Packer
from ..quant.transposed_stack import StackLayout, matrices_of
from .base import Checkpoint, TensorInfo
from .files import DataFile, inside, read_json
from .safetensors import FLOATS, open_safetensors
from .stacks import StackShape

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)$")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json, without `auto_map`, which names code to run: code from a checkpoint is never run."""
    if not (directory / CONFIG).exists():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(
                "is an adapter, not a model; load the model it was trained on and attach the adapter with PEFT, or merge both "
                "(dso train --merge)",
                file=directory,
            )
        raise CheckpointError(f"contains no {CONFIG}", file=directory)
    config = read_json(directory, CONFIG)
    config.pop("auto_map", None)
    return config


def open_files(directory: Path) -> tuple[dict[Path, DataFile], dict[str, TensorInfo]]:
    """Opens and checks the directory's safetensors files: files by path, tensors by name."""
    weight_map = None
    if (directory / SINGLE).exists():
        names = [SINGLE]
    elif (directory / INDEX).exists():
        weight_map = _weight_map(directory)
        names = sorted(set(weight_map.values()))
    else:
        raise _no_weights(directory)
    files: dict[Path, DataFile] = {}
    tensors: dict[str, TensorInfo] = {}
    try:
        for name in names:
            path = inside(directory, name)
            if not os.path.exists(path):  # unlike Path.exists, False for an invalid name
                raise CheckpointError(f"is listed in {INDEX} but does not exist; download it again", file=path)
            files[path] = DataFile(path)
            for tensor in open_safetensors(files[path]).tensors.values():
                if tensor.name in tensors:
                    raise CheckpointError(
                        f"is also in {tensors[tensor.name].file.name}: a tensor must be in one shard only",
                        file=path,
                        tensor=tensor.name,
                    )
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _compare(directory, weight_map, tensors)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return files, tensors


def _weight_map(directory: Path) -> dict[str, str]:
    weight_map = read_json(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError("weight_map must map tensor names to file names", file=directory / INDEX)
    return weight_map


def _compare(directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError if the index and the shards' headers disagree."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != directory / file:
            raise CheckpointError(f"is not in {file}, where {INDEX} says it is", file=directory / file, tensor=name)
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"is not listed in {INDEX}", file=tensor.file, tensor=name)


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(p.name for p in directory.iterdir() if _PICKLES.match(p.name))
    if pickles:
        return CheckpointError(
            f"contains only pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are not read. If "
            "you trust their source, convert them to safetensors: "
            "AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)",
            file=directory,
        )
    ggufs = sorted(p.name for p in directory.iterdir() if p.suffix == ".gguf")
    if ggufs:
        return CheckpointError(f"contains GGUF files; give the path of one of them: {', '.join(ggufs[:5])}", file=directory)
    return CheckpointError(f"contains neither {SINGLE} nor {INDEX}", file=directory)


_INTEGERS = {"I32": torch.int32, "I64": torch.int64}
# Names that tensors of integers end with: the experts of each token id; the tokens of a draft vocabulary.
_TABLES = (".gate.tid2eid", ".shared_head.tokens")


class SafetensorsCheckpoint(Checkpoint):
    """Float weights in safetensors files. Read with pread: nothing stays mapped."""

    kind: ClassVar[str] = "safetensors"

    def __init__(self, directory: Path, config: dict[str, Any], files: dict[Path, DataFile], tensors: Mapping[str, TensorInfo]):
        super().__init__(directory, config, tensors)
        self._files = files
        self.parts_of: dict[str, list[TensorInfo]] = {}  # of tensors that are stored in several
        self.transposed: Mapping[str, StackLayout] = {}  # the layout of transposed stacks, see `quant/transposed_stack.py`

    def read(self, name: str) -> torch.Tensor:
        parts = [self._read(info) for info in self.parts_of.get(name, [self.info(name)])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, info: TensorInfo) -> torch.Tensor:
        data = self._files[info.file].read_tensor(info.offset, info.nbytes)
        return self._float(data.view(self._dtype(info))).reshape(info.shape)

    def read_rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        info = self.info(name)
        stride = info.nbytes // math.prod(info.shape[:-1])
        data = self._files[info.file].read_tensor(info.offset + begin * stride, (end - begin) * stride)
        return self._float(data.view(self._dtype(info))).reshape(end - begin, info.shape[-1])

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        stored = super().stored(name, shape)
        if name not in self.transposed:
            return stored
        return {tensor: (experts, cols, rows) for tensor, (experts, rows, cols) in stored.items()}

    def pack_matrices(self, name: str, format: str, shape: StackShape, first: int, packer: Packer, out: torch.Tensor) -> None:
        """As in the base class; of a transposed stack, an expert at a time."""
        if name not in self.transposed:
            return super().pack_matrices(name, format, shape, first, packer, out)
        count, rows, cols = shape
        each = count // self.info(name).shape[0]
        for i, tiles in enumerate(out.unflatten(0, (-1, each)), first // each):
            expert = self.read_rows(name, i * cols, (i + 1) * cols)
            for matrix, part in zip(matrices_of(expert[None], rows, self.transposed[name])[0], tiles, strict=True):
                self.pack_checked(name, matrix.contiguous(), format, packer, part)
        return None

    def check_dtype(self, name: str) -> None:
        self._dtype(self.info(name))

    @staticmethod
    def _float(values: torch.Tensor) -> torch.Tensor:
        return values.float() if values.dtype == torch.float64 else values

    @staticmethod
    def _dtype(info: TensorInfo) -> torch.dtype:
        if info.dtype in _INTEGERS and info.name.endswith(_TABLES):
            return _INTEGERS[info.dtype]
        if info.dtype not in FLOATS:
            fp8 = "; FP8 weights need their original quantization_config in config.json" if info.dtype.startswith("F8") else ""
            raise CheckpointError(
                f"is stored as {info.dtype}; weights must be {', '.join(FLOATS)}{fp8}", file=info.file, tensor=info.name
            )
        return FLOATS[info.dtype]

    def check_unchanged(self) -> None:
        for file in self._files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
