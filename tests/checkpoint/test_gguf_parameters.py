"""Parameters as rows of stored tensors: any range of rows equals that of the whole, decoded or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepseek_optimizer.checkpoint.gguf_header import GgufTensor
from deepseek_optimizer.checkpoint.gguf_parameters import Parameter, halves_first
from deepseek_optimizer.quant import ColumnOrder
from deepseek_optimizer.quant.ggml import GGML_TYPES

TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
COLS = 64


class File:
    """Tensors of random bytes, and the spans that were read."""

    def __init__(self) -> None:
        self.data: dict[str, torch.Tensor] = {}
        self.reads: list[tuple[str, int, int]] = []

    def tensor(self, name: str, rows: int, kind: str = "Q8_0") -> GgufTensor:
        width = TYPES[kind].row_bytes(COLS)
        self.data[name] = torch.randint(0, 200, (rows, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
        return GgufTensor(name, TYPES[kind], (rows, COLS), 0, rows * width)

    def read(self, tensor: GgufTensor, begin: int, end: int) -> torch.Tensor:
        self.reads.append((tensor.name, begin, end))
        return self.data[tensor.name][begin:end]


def decode(tensor: GgufTensor, blocks: torch.Tensor) -> torch.Tensor:
    """Not the type's real values: the bytes as numbers, one for each column."""
    return blocks[:, :1].float() + torch.arange(COLS)


def ranges(rows: int) -> list[tuple[int, int]]:
    return [(0, 1), (0, rows), (rows - 1, rows), (rows // 3, rows // 2 + 1), (1, rows - 1)]


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_any_range_of_rows(sources: int) -> None:
    file = File()
    tensors = tuple(file.tensor(f"t{i}", 40 + 7 * i) for i in range(sources))
    rows = sum(t.shape[0] for t in tensors)
    whole = torch.cat([file.data[t.name] for t in tensors])
    for order in (None, np.random.default_rng(0).permutation(rows), np.arange(rows)[::-1].copy()):
        parameter = Parameter(tensors, (rows, COLS), order)
        expected = whole if order is None else whole[torch.from_numpy(order)]
        assert parameter.type is TYPES["Q8_0"] and not parameter.misshapen()
        for begin, end in ranges(rows):
            assert torch.equal(parameter.blocks(begin, end, file.read), expected[begin:end])
            values = parameter.floats(begin, end, file.read, decode)
            assert torch.equal(values, expected[begin:end, :1].float() + torch.arange(COLS))


def test_tensors_of_different_types_are_decoded() -> None:
    file = File()
    tensors = (file.tensor("a", 5, "Q8_0"), file.tensor("b", 6, "F16"))
    parameter = Parameter(tensors, (11, COLS), np.arange(11)[::-1].copy())
    assert parameter.type is None and parameter.type_name == "Q8_0 and F16" and parameter.fallback == "int8"
    first = torch.cat([file.data["a"][:, 0], file.data["b"][:, 0]]).flip(0)
    assert torch.equal(parameter.floats(0, 11, file.read, decode)[:, 0], first.float())


def test_only_needed_rows_are_read() -> None:
    file = File()
    parameter = Parameter((file.tensor("t", 5000),), (2, COLS), np.array([4000, 10]))
    parameter.blocks(0, 2, file.read)
    assert sorted(file.reads) == [("t", 10, 11), ("t", 4000, 4001)]


def test_columns_move_with_their_blocks() -> None:
    """Blocks of Q8_0 have 32 columns: runs of 32 columns are brought into order undecoded, shorter ones stay as stored."""
    file = File()
    tensor = file.tensor("t", 9)
    wide = GgufTensor("w", TYPES["Q8_0"], (9, 2 * COLS), 0, 9 * 4 * 34)
    file.data["w"] = torch.arange(9 * 4).repeat_interleave(34).to(torch.uint8).view(9, 4 * 34)
    order = ColumnOrder(2, 2)
    moved = Parameter((wide,), (9, 2 * COLS), columns=order)
    first, second, third, fourth = file.data["w"].view(9, 4, 34).unbind(1)
    assert moved.stored_order is None
    assert torch.equal(moved.blocks(2, 9, file.read), torch.cat([first, third, second, fourth], 1)[2:9])
    short = Parameter((tensor,), (9, COLS), columns=order)
    assert short.stored_order == order and torch.equal(short.blocks(2, 9, file.read), file.data["t"][2:9])
    columns = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]
    assert torch.equal(short.floats(0, 9, file.read, decode), decode(tensor, file.data["t"])[:, columns])


def test_vectors() -> None:
    parts = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    tensors = tuple(GgufTensor(name, TYPES["F32"], tuple(part.shape), 0, 4 * len(part)) for name, part in parts.items())
    parameter = Parameter(tensors, (3,), np.array([2, 0, 1]), convert=lambda values: values - 1)
    assert parameter.vector(lambda tensor: parts[tensor.name]).tolist() == [2.0, 0.0, 1.0] and parameter.type is None


@pytest.mark.parametrize(
    "fields, misshapen",
    [
        ({"shape": (10, COLS)}, False),
        ({"shape": (9, COLS)}, True),
        ({"shape": (10, 32)}, True),
        ({"shape": (2, 5, COLS)}, False),
        ({"shape": (3, COLS), "order": np.array([9, 0, 1])}, False),
        ({"shape": (3, COLS), "order": np.array([10, 0, 1])}, True),
        ({"shape": (4, COLS), "order": np.array([9, 0, 1])}, True),
    ],
)
def test_misshapen(fields: dict[str, Any], misshapen: bool) -> None:
    assert Parameter((File().tensor("t", 10),), **fields).misshapen() is misshapen


def test_halves_first() -> None:
    assert halves_first(2, 6, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert halves_first(1, 4, 4).tolist() == [0, 2, 1, 3]
