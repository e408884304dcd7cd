"""The last hidden states of a frozen model at its training data, in a file: only the first epoch runs the model (`dso draft`).

A row of a batch is found by its content up to its last label; nothing after that is trained, and no state before it depends on
what follows. So the rows of later epochs may be in other batches, with other padding.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from .mtp_loss import IGNORED

_SHARE: Final = 0.5  # of the free space of the disk


class _Place(NamedTuple):
    """Where the states of a row begin in the file, and their number."""

    offset: int
    length: int


class StoredStates:
    """Hidden states and the most likely tokens after them, by row. The file has no name and ends with the process.

    Args:
        folder: a directory on the disk to use.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed with the object
        self._free = int(_SHARE * shutil.disk_usage(folder).free)
        self._places: dict[bytes, _Place] = {}
        self._end = 0

    def find(
        self, ids: torch.Tensor, labels: torch.Tensor, inputs: Mapping[str, Any], width: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The states [B, S, H] and most likely tokens int64 [B, S] of a batch, 0 after the last label of each row; None if they
        are not stored.

        Args:
            ids, labels: int64 [B, S].
            inputs: what else the model's forward would get.
            width, dtype: H, and the dtype of the states.
        """
        places = [self._places.get(key) for key, _ in _keys(ids, labels, inputs)]
        found = [place for place in places if place is not None]
        if len(found) < len(places):
            return None
        states = torch.zeros(*ids.shape, width, dtype=dtype, device="cpu")
        likely = torch.zeros(ids.shape, dtype=torch.int64, device="cpu")
        for row, (offset, length) in enumerate(found):
            size = length * width * dtype.itemsize
            self._file.seek(offset)
            data = bytearray(self._file.read(size + 8 * length))
            if length:
                states[row, :length] = torch.frombuffer(data, dtype=dtype, count=length * width).view(length, width)
                likely[row, :length] = torch.frombuffer(data, dtype=torch.int64, offset=size, count=length)
        return states.to(ids.device), likely.to(ids.device)

    def add(
        self, ids: torch.Tensor, labels: torch.Tensor, inputs: Mapping[str, Any], states: torch.Tensor, likely: torch.Tensor
    ) -> None:
        """Stores a batch, as far as there is room on the disk. Arguments as in `find`."""
        for row, (key, length) in enumerate(_keys(ids, labels, inputs)):
            own = states[row, :length].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            data = own + likely[row, :length].cpu().numpy().astype(np.int64).tobytes()
            if key in self._places or self._end + len(data) > self._free:
                continue
            self._file.seek(self._end)
            self._file.write(data)
            self._places[key] = _Place(self._end, length)
            self._end += len(data)


def _keys(ids: torch.Tensor, labels: torch.Tensor, inputs: Mapping[str, Any]) -> list[tuple[bytes, int]]:
    """For each row of a batch, a digest of what its states depend on, and the number of tokens up to its last label."""
    columns = torch.arange(1, ids.shape[1] + 1, device=ids.device, dtype=torch.int64)
    ends = torch.where(labels == IGNORED, 0, columns).amax(-1).tolist()
    parts = [ids, *(part for name in ("position_ids", "attention_mask") if (part := inputs.get(name)) is not None)]
    rows = [np.ascontiguousarray(part.expand(len(ids), *part.shape[1:]).cpu().numpy()) for part in parts]
    keys = []
    for row, end in enumerate(ends):
        digest = hashlib.blake2b(digest_size=16)
        for part in rows:
            digest.update(part[row, ..., :end].tobytes())
        keys.append((digest.digest(), end))
    return keys
