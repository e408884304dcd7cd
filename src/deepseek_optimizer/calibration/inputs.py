"""The inputs of a layer's matrices on a calibration text, from which compensated rounding computes their second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backends.base import Backend
from ..quant import PackedMatrix

FEWEST = 0.5  # inputs per column of a matrix; with fewer, their second moment says too little about other texts


class Inputs:
    """The inputs of matrices, by name. Attribute `rows`: the inputs of each, as tensors [n, K] in the order of the calls."""

    def __init__(self) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Adds inputs, float [..., K], of the matrix `name`. They are not copied."""
        self.rows.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

    def enough(self, name: str, columns: int) -> bool:
        """Whether a matrix with this number of columns had enough inputs."""
        return sum(map(len, self.rows.get(name, ()))) >= FEWEST * columns

    def shared(self, names: Sequence[str]) -> list[list[str]]:
        """Groups of names that had the very same inputs, such as those of q, k and v, in order."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            groups.setdefault(tuple(x.data_ptr() for x in self.rows[name]), []).append(name)
        return list(groups.values())


def moment_of(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], backend: Backend) -> torch.Tensor:
    """Sum of x y^T over the rows x of `left` and y of `right`, which correspond to each other, float32 [K, L].

    The rows are rounded to bf16, as most models compute them; the sums are float32.
    """
    columns = _columns(right)
    packed = PackedMatrix("bf16", columns.shape[0], columns.shape[1], backend.pack(columns, "bf16"))
    return backend.linear(columns if left is right else _columns(left), packed)


def _columns(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.bfloat16() for x in rows]).t().contiguous()  # half the bytes of float32 to transpose
