"""The state of an optimizer, a scheduler or a random generator as one safetensors file, without pickle.

Tensors are stored under the path that leads to them ("state/0/m"). The structure around them (dictionaries with keys of any
plain type, lists, tuples, numbers, strings) is JSON in the file's metadata, and is restored exactly: keys keep their types,
tuples stay tuples, floats keep every bit. The file is written tensor by tensor, so saving needs no more extra memory than the
largest tensor that is not contiguous in CPU memory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ...checkpoint.files import DataFile
from ...checkpoint.safetensors import open_safetensors
from ...errors import CheckpointError

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TREE = "state"  # key of the JSON in the metadata
_PLAIN = (str, int, float, bool, type(None))


def write_state(path: Path, state: Any) -> None:
    """Writes a tree of dictionaries, lists, tuples, plain values, tensors and numpy arrays to a safetensors file.

    Raises:
        CheckpointError: a value has another type, which would need pickle; the message contains its path.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "", tensors, path)
    # Sorted by item size, so that every tensor is aligned to its item size, as needed by readers that map the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {_TREE: json.dumps(tree)}}
    at = 0
    for name in names:
        end = at + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write(file, tensors[name])


def read_state(path: Path) -> Any:
    """Reads a tree written by `write_state`. Tensors are on the CPU, in memory of their own.

    Raises:
        CheckpointError: the file is damaged, or was not written by `write_state`.
    """
    file = DataFile(path)
    try:
        contents = open_safetensors(file)
        if _TREE not in contents.metadata:
            raise CheckpointError("is not a training state: its metadata has no such entry", file=path)
        tensors = {
            name: file.read_tensor(info.offset, info.nbytes).view(_DTYPES[info.dtype]).reshape(info.shape)
            for name, info in contents.tensors.items()
        }
        return _unflatten(json.loads(contents.metadata[_TREE]), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"is damaged: the structure of the state is invalid ({error})", file=path) from error
    finally:
        file.close()


def _flatten(value: Any, at: str, tensors: dict[str, torch.Tensor], file: Path) -> Any:
    """Converts `value` to JSON and adds its tensors to `tensors`. Tensors become {"tensor": name}, numpy arrays {"array":
    name}, tuples {"tuple": items}, dictionaries {"dict": pairs}; lists and plain values stay."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _NAMES:
            raise CheckpointError(f"has dtype {value.dtype}, which cannot be stored", file=file, tensor=at)
        tensors[at] = value.detach()
        return {"tensor": at}
    if isinstance(value, np.ndarray):
        tensors[at] = torch.from_numpy(np.ascontiguousarray(value))
        return {"array": at}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict) and all(type(key) in _PLAIN for key in value):
        return {"dict": [[key, _flatten(item, f"{at}/{key}", tensors, file)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{at}/{i}", tensors, file) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if type(value) in _PLAIN:
        return value
    raise CheckpointError(
        f"{at or 'the state'} is a {type(value).__name__}, which cannot be stored without pickle; use save_only_model=True, or "
        "a scheduler and optimizer whose state_dict() has only tensors and plain values",
        file=file,
    )


def _unflatten(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")


def _write(file: BinaryIO, tensor: torch.Tensor) -> None:
    if tensor.numel():
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        view = flat.numpy().data
        while view:  # a write may be partial; on a full disk, the next one raises
            view = view[file.write(view) :]


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sizes(state: Any) -> int:
    """The total size in bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(sizes(item) for item in state.values())
    return sum(sizes(item) for item in state) if isinstance(state, (list, tuple)) else 0


def is_pickle(name: str) -> bool:
    """Whether a file is pickled, by its suffix; opening such a file could run code."""
    return os.path.splitext(name)[1] in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
