"""What the contents of a model's cache depend on, so that they are used only by a model that would compute the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from ...backends.parallel import RankBackend, StageBackend
from ...quant.packed import PackedWeight
from ...versions import versions
from ..bind.host_experts import host_experts
from ..bind.runtime import Runtime

_SAMPLE = 4096  # bytes hashed at the beginning and end of each weight, to distinguish models of the same shape


def fingerprint(runtime: Runtime, *, whole: bool = False) -> dict[str, str]:
    """Hashes or names of everything that the contents of a cache depend on: the graph (with RoPE and attention), the weights
    and their formats, the cache's format, and the backend.

    Args:
        runtime: the model's runtime.
        whole: hash all bytes of the weights, which takes a second per gigabyte and core; otherwise a sample of each.

    Raises:
        RankLostError: one of several processes has ended.
    """
    backend = runtime.backend
    if isinstance(backend, (RankBackend, StageBackend)):
        parts = backend.fingerprints(whole, partial(part_fingerprint, runtime, whole))
        weights = {"division": backend.division, "parts": repr(parts)}
    else:
        weights = _of_weights(runtime, whole)
    return {
        "model": _hash([[node.op, node.weights, _plain(node.attrs)] for node in runtime.graph.nodes]),
        **weights,
        "activation format": runtime.config.activation,
        "KV cache format": runtime.kv_dtype,
        "backend": runtime.backend.name,
        "experts on the CPU": str(len(host_experts(runtime.model))),  # its results have other last bits
    }


def part_fingerprint(runtime: Runtime, whole: bool) -> str:
    """A hash of what may differ between the processes of a divided model: weights, their formats, instruction set and versions.

    Args:
        runtime, whole: as for `fingerprint`; of the process's part.
    """
    own = [_of_weights(runtime, whole), str(runtime.backend.isa), sorted(versions().items())]
    return _hash(own)


def _of_weights(runtime: Runtime, whole: bool) -> dict[str, str]:
    """Hashes of the weights that this process has, and of their formats."""
    weights = runtime.weights_of(runtime.graph)
    formats = {name: w.format if isinstance(w, PackedWeight) else str(w.dtype) for name, w in weights.items()}
    return {
        "weights": _hash(_all_bytes(weights) if whole else [[name, _sample(weights[name])] for name in sorted(weights)]),
        "weight format": _hash(formats),
    }


def _all_bytes(weights: Mapping[str, Any]) -> list[list[str]]:
    """The name and a hash of each weight. Weights with the same storage are hashed once."""
    data = {name: _flat(weight) for name, weight in weights.items()}
    storage = {(flat.data_ptr(), flat.nbytes): flat for flat in data.values()}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashing releases the interpreter lock
        digests = dict(zip(storage, pool.map(_digest, storage.values()), strict=True))
    return [[name, digests[data[name].data_ptr(), data[name].nbytes], str(tuple(data[name].shape))] for name in sorted(weights)]


def _digest(flat: torch.Tensor) -> str:
    return hashlib.blake2b(flat.cpu().view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def _flat(weight: Any) -> torch.Tensor:
    """All elements as a contiguous vector."""
    data: torch.Tensor = weight.data if isinstance(weight, PackedWeight) else weight
    return data.detach().reshape(-1).contiguous()


def _sample(weight: Any) -> str:
    data = (weight.data if isinstance(weight, PackedWeight) else weight).detach().reshape(-1)
    count = max(1, _SAMPLE // data.element_size())
    ends = torch.cat([data[:count], data[-count:]]).cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(ends.tobytes() + str(tuple(data.shape)).encode(), digest_size=16).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """A JSON value of a graph attribute, equal for equal attributes in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, partial):  # the frequencies of dynamic RoPE
        return [value.func.__qualname__, _plain(value.args), _plain(value.keywords)]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, Enum) or value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise TypeError(f"a graph attribute of type {type(value).__name__} has no fingerprint")
